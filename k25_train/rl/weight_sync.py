"""From the trainer's weights, in any layout, to all engines: one version at a time, and proven by a probe.

    every rank: its shards ─► stream of released tensors ─► first rank ─► transport ─► pool.update
                                                            tensor by tensor      stage all, commit all
    afterwards: probe(engines) == forward pass of the trainer, or the engine is fenced off

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

import time
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from k25_train.checkpoint.agreement import on_first_rank
from k25_train.config.rollout import EngineKind, EngineWeights, RolloutConfig
from k25_train.config.rollout import Transport as TransportKind
from k25_train.errors import ConfigError, TrainingError
from k25_train.export.listing import Contents, ReleasedTensor, WeightFormat, released_tensors
from k25_train.export.live import LiveTensors
from k25_train.export.stream import NamedTensor, as_stored
from k25_train.rl.transports.base import WeightTransport
from k25_train.rl.transports.in_memory import InMemory
from k25_train.rl.transports.shared_memory import SharedMemory
from k25_train.rollout.engines.pool import EnginePool, Weights
from k25_train.training.run import Run

FORMATS = {
    EngineWeights.float32: WeightFormat.float32,
    EngineWeights.bf16: WeightFormat.bf16,
    EngineWeights.int4: WeightFormat.int4,
}
"""Number format of `rollout.weights` -> that of the stream."""


class Waiting(Protocol):
    """Runs what engines are asked for on the event loop that they are of; the first rank has one."""

    def __call__(self, call: Awaitable[Any]) -> Any:
        """Wait for it; returns or raises what it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """What a push has cost, the same on every rank."""

    version: int
    """Version that all serving engines sample from."""
    num_bytes: int
    """Bytes of the tensors."""
    gather_s: float
    """Seconds until the first rank had given them to the transport."""
    update_s: float
    """Seconds in which engines staged and committed them."""

    @property
    def sync_s(self) -> float:
        """Seconds of both."""
        return self.gather_s + self.update_s


class WeightSync:
    """Pushes the weights of a run to its engines. Every rank calls every method."""

    def __init__(self, run: Run, transport: WeightTransport, pool: EnginePool | None, wait: Waiting) -> None:
        """
        Args:
            run: whose weights are pushed.
            transport: how they get to engines; used on the first rank.
            pool: the engines, on the first rank; None on others, which have none.
            wait: runs calls of engines, on the first rank.
        """
        assert run.config.rollout is not None, "a run of reinforcement learning"
        self._run = run
        self._transport = transport
        self._pool = pool
        self._wait = wait
        self._format = FORMATS[run.config.rollout.weights]
        self._tensors = list(tensors_of(run, self._format))

    def push(self, version: int) -> Push:
        """Bring all engines to the weights that the run has now, as `version`.

        Raises `EngineError`, on every rank, if no engine is left, and `MachineError` if the transport has no
        room.
        """
        started = time.perf_counter()
        with self._run.tracker.phase("push weights", range(self._run.topology.world_size)):
            taken = self._take(version)
            gathered = time.perf_counter()
            num_bytes, update_s = on_first_rank(lambda: self._update(taken, version, gathered))
        return Push(version=version, num_bytes=num_bytes, gather_s=gathered - started, update_s=update_s)

    def close(self) -> None:
        """Leave nothing behind."""
        self._transport.close()

    def _take(self, version: int) -> "_Taken":
        """All tensors on the first rank; every rank sends its share."""
        live = LiveTensors(self._run.modules, self._tensors)
        stream = live.gathered(self._run.topology.group("world"), 0)
        if not self._run.is_main:
            for _ in stream:
                pass
            return _Taken()
        taken = _Taken()
        stored = as_stored(stream, self._tensors, self._format)
        try:
            taken.weights = self._transport.take(taken.counted(stored), version)
        except Exception as error:
            # Others wait to send: they are told once all was received.
            for _ in stream:
                pass
            taken.error = error
        return taken

    def _update(self, taken: "_Taken", version: int, started: float) -> tuple[int, float]:
        if taken.error is not None:
            raise taken.error
        if self._pool is None or taken.weights is None:
            raise TrainingError("the first rank has no engines to push weights to")
        self._wait(self._pool.rebuild())
        self._wait(self._pool.update(taken.weights, version))
        self._transport.committed(version)
        return taken.num_bytes, time.perf_counter() - started


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


def tensors_of(run: Run, weights: WeightFormat) -> Iterator[ReleasedTensor]:
    """What is pushed, in the order of the release."""
    contents = Contents.all if run.config.model.has_vision else Contents.text
    for tensor in released_tensors(run.config.model, contents):
        yield replace(tensor, dtype="float32") if weights is WeightFormat.float32 else tensor


def build_transport(rollout: RolloutConfig) -> WeightTransport:
    """The transport of `rollout.transport`. Raises `ConfigError` for one that this machine has not."""
    if rollout.engine is EngineKind.in_process:
        return InMemory()
    if rollout.transport is TransportKind.shared_memory:
        return SharedMemory()
    raise ConfigError(
        f"rollout.transport={rollout.transport.value}: needs CUDA, and engines that take part in it; use "
        "rollout.transport=shared_memory with engines on the first rank's node"
    )
