"""What takes the stream of released tensors on the first rank, and makes of it what engines stage."""

from collections.abc import Iterable
from typing import Protocol

from k25_train.export.stream import NamedTensor
from k25_train.rollout.engines.pool import Weights


class WeightTransport(Protocol):
    """One way to engines. Used on the first rank alone."""

    def take(self, stream: Iterable[NamedTensor], version: int) -> Weights:
        """Take all tensors of a version, one at a time; what engines stage.

        Raises `MachineError` if there is no room; the stream is exhausted all the same, as other ranks wait
        to send.
        """

    def committed(self, version: int) -> None:
        """All engines have `version`: earlier ones can go."""

    def close(self) -> None:
        """Leave nothing behind."""
