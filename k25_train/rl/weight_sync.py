"""From the trainer's weights, in any layout, to all engines: one version at a time.

    every rank: its shards ─► stream of released tensors ─► a way to engines ─► all sample from version N

Ways (`transports/`): gathered on the first rank, for an engine in the same process or as files in shared
memory; NCCL and checkpoint-engine on GPUs. That engines really have the weights is shown by `probe.py`.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from k25_train.config.basics import DType
from k25_train.config.rollout import EngineWeights
from k25_train.export.listing import Contents, ReleasedTensor, WeightFormat, released_tensors
from k25_train.rl.transports.base import Way
from k25_train.rl.transports.stream import PushedStream
from k25_train.training.run import Run

FORMATS = {
    EngineWeights.float32: WeightFormat.float32,
    EngineWeights.bf16: WeightFormat.bf16,
    EngineWeights.int4: WeightFormat.int4,
}
"""Number format of `rollout.weights` -> that of the stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """What a push has cost."""

    version: int
    """Version that all serving engines sample from."""
    num_bytes: int
    """Bytes of the tensors."""
    sync_s: float
    """Seconds until engines sampled from it."""


class WeightSync:
    """Pushes the weights of a run to its engines. Every rank calls every method."""

    def __init__(self, run: Run, weights: EngineWeights, way: Way) -> None:
        """`weights`: their number format in engines."""
        self._run = run
        self._way = way
        self._format = FORMATS[weights]
        self._tensors = list(tensors_of(run, self._format))

    def push(self, version: int) -> Push:
        """Bring all engines to the weights that the run has now, as `version`. Raises as `Way.push`."""
        started = time.perf_counter()
        with self._run.tracker.phase("push weights", range(self._run.topology.world_size)):
            stream = PushedStream(self._run, self._tensors, self._format)
            num_bytes = self._way.push(stream, version)
        return Push(version=version, num_bytes=num_bytes, sync_s=time.perf_counter() - started)

    def close(self) -> None:
        """Leave nothing behind."""
        self._way.close()


def tensors_of(run: Run, weights: WeightFormat) -> Iterator[ReleasedTensor]:
    """What is pushed, in the order of the release."""
    contents = Contents.all if run.config.model.has_vision else Contents.text
    is_float32 = run.config.train.dtype is DType.float32 and weights is not WeightFormat.bf16
    for tensor in released_tensors(run.config.model, contents):
        # Experts are packed from bfloat16; all else stays what the trainer computes with.
        is_packed = tensor.is_expert and weights is WeightFormat.int4
        yield replace(tensor, dtype="float32") if is_float32 and not is_packed else tensor
