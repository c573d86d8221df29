"""The weights of a run as engines get them: the stream of released tensors, by rank or all on the first one.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

from collections.abc import Iterable, Iterator, Sequence

from k25_train.export.listing import ReleasedTensor, StoredEntry, WeightFormat
from k25_train.export.live import LiveTensors
from k25_train.export.stream import NamedTensor, as_computed, as_stored
from k25_train.training.run import Run


class PushedStream:
    """One version of the weights. Every rank has one, and calls the same of `gathered` and `own`."""

    def __init__(self, run: Run, tensors: Sequence[ReleasedTensor], weights: WeightFormat) -> None:
        """Called by every rank; the weights are those of the moment, until the next update."""
        self._run = run
        self._tensors = tensors
        self._weights = weights
        self._live = LiveTensors(run.modules, tensors)
        self._sent: Iterator[NamedTensor] | None = None

    def entries(self) -> Iterator[StoredEntry]:
        """What `gathered` yields, in order, without its elements."""
        for tensor in self._tensors:
            yield from tensor.entries(self._weights)

    def own(self) -> Iterator[NamedTensor]:
        """This rank's share; all ranks together have every tensor once."""
        return self._stored(self._live, self._live.held)

    def gathered(self) -> Iterator[NamedTensor]:
        """All tensors on the first rank; others send theirs, and have none.

        Whoever stops early calls `drain`, since ranks wait to send.
        """
        self._sent = sent = self._live.gathered(self._run.topology.group("world"), 0)
        if self._run.is_main:
            return self._stored(sent, self._tensors)
        self.drain()
        return iter(())

    def _stored(
        self, stream: Iterable[NamedTensor], tensors: Sequence[ReleasedTensor]
    ) -> Iterator[NamedTensor]:
        """As engines get them; plain weights of experts are those that the trainer computes with."""
        if self._weights is not WeightFormat.int4:
            stream = as_computed(stream, tensors, self._run.config.model.quantization)
        return as_stored(stream, tensors, self._weights)

    def drain(self) -> None:
        """Let other ranks send what is left, or all of it if nobody has asked for it."""
        if self._sent is None:
            self.gathered()
        for _ in self._sent or ():
            pass
