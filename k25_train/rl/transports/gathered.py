"""All tensors to the first rank, and from there to engines that stage them before any of them commits.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from k25_train.checkpoint.agreement import on_first_rank
from k25_train.errors import TrainingError
from k25_train.export.stream import NamedTensor
from k25_train.rl.transports.base import Waiting, WeightTransport
from k25_train.rl.transports.stream import PushedStream
from k25_train.rollout.engines.pool import EnginePool, Weights


class GatheredWay:
    """See `Way`."""

    def __init__(self, transport: WeightTransport, pool: EnginePool | None, wait: Waiting) -> None:
        """
        Args:
            transport: what engines stage is made by it, on the first rank.
            pool: the engines, on the first rank; None on others.
            wait: runs calls of engines, on the first rank.
        """
        self._transport = transport
        self._pool = pool
        self._wait = wait

    def push(self, stream: PushedStream, version: int) -> int:
        """See `Way`."""
        taken = self._take(stream, version)
        return on_first_rank(lambda: self._update(taken, version))

    def close(self) -> None:
        """See `Way`."""
        self._transport.close()

    def _take(self, stream: PushedStream, version: int) -> "_Taken":
        """All tensors on the first rank; every rank sends its share."""
        taken, tensors = _Taken(), stream.gathered()
        if self._pool is not None:
            try:
                taken.weights = self._transport.take(taken.counted(tensors), version)
            except Exception as error:
                # Others wait to send: they are told once all was received.
                stream.drain()
                taken.error = error
        return taken

    def _update(self, taken: "_Taken", version: int) -> int:
        if taken.error is not None:
            raise taken.error
        if self._pool is None or taken.weights is None:
            raise TrainingError("the first rank has no engines to push weights to")
        self._wait(self._pool.rebuild())
        self._wait(self._pool.update(taken.weights, version))
        self._transport.committed(version)
        return taken.num_bytes


@dataclass(slots=True)
class _Taken:
    """What the transport has made of the stream."""

    weights: Weights | None = None
    """What engines stage; None on other ranks than the first."""
    num_bytes: int = 0
    """Bytes of its tensors."""
    error: Exception | None = None
    """Why there is nothing."""

    def counted(self, stream: Iterator[NamedTensor]) -> Iterator[NamedTensor]:
        """The same stream, whose bytes are added up."""
        for each in stream:
            self.num_bytes += each.tensor.nbytes
            yield each
