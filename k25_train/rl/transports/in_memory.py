"""Tensors themselves, for an engine in the same process."""

from collections.abc import Iterable

from k25_train.export.stream import NamedTensor
from k25_train.rollout.engines.pool import Weights


class InMemory:
    """Copies: those of the trainer change with its next update."""

    def take(self, stream: Iterable[NamedTensor], version: int) -> Weights:
        """See `WeightTransport`."""
        return [NamedTensor(name, tensor.detach().clone()) for name, tensor in stream]

    def committed(self, version: int) -> None:
        """See `WeightTransport`; an engine holds its own."""

    def close(self) -> None:
        """See `WeightTransport`."""
