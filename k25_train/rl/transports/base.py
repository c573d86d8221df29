"""Ways of weights from the trainer to engines, of which every rank calls every method."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

from k25_train.export.stream import NamedTensor
from k25_train.rl.transports.stream import PushedStream
from k25_train.rollout.engines.pool import Weights

Waiting = Callable[[Awaitable[Any]], Any]
"""Runs what engines are asked for on the event loop that they are of, on the first rank, and waits for it."""


class Way(Protocol):
    """Brings a version of the weights to all engines."""

    def push(self, stream: PushedStream, version: int) -> int:
        """Bring it to all engines, which sample from it when this returns; returns the bytes of its tensors.

        Raises, on every rank, `EngineError` if no engine is left, `MachineError` if there is no room.
        """

    def close(self) -> None:
        """Leave nothing behind."""


class WeightTransport(Protocol):
    """Takes all tensors on the first rank, and makes of them what engines stage. Used on that rank alone."""

    def take(self, stream: Iterable[NamedTensor], version: int) -> Weights:
        """Take all tensors of a version, one at a time; what engines stage.

        Raises `MachineError` if there is no room.
        """

    def committed(self, version: int) -> None:
        """All engines have `version`: earlier ones can go."""

    def close(self) -> None:
        """Leave nothing behind."""
