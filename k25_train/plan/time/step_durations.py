"""How long passes take in a step: those of the language model, and what a step adds to them; torch-free.

Added are a coupled tower, which runs in the passes of the first chunk; gathering and reducing weights that
are cut over data-parallel ranks (`OtherCode.sharding`); and a slow node, whose ranks are planned with kernels
that take longer. It is one of the stage that is busiest without it, where it delays the step most.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Protocol

from k25_train.plan.assumptions import Sharding
from k25_train.plan.cause import Cause
from k25_train.plan.pipeline import PipelinePlan
from k25_train.plan.time.data_parallel import chunk_exchange
from k25_train.plan.time.encoder import coupled_pass_s
from k25_train.plan.time.passes import PassTime, pass_times
from k25_train.plan.time.schedule import PassUse
from k25_train.plan.weight_bytes import WEIGHT_BYTES


class Passes(Protocol):
    """What passes take on a device, as `pass_times` plans it."""

    def alone(self, chunk: int, is_forward: bool) -> PassTime:
        """A pass that runs by itself."""

    def pair(self, forward_chunk: int, backward_chunk: int) -> PassTime:
        """A forward and a backward pass that run overlapped."""


class StepDurations:
    """`Durations` of the passes of a step, and where their time goes."""

    def __init__(self, pipeline: PipelinePlan, slow_stage: int | None = None) -> None:
        """
        Args:
            pipeline: what is planned.
            slow_stage: the one that has the slow node; None for none.
        """
        self._pipeline = pipeline
        self._slow_stage = slow_stage
        self._passes: Passes = pass_times(pipeline)
        self._slow_passes = self._passes if slow_stage is None else pass_times(_with_slow_kernels(pipeline))
        self._cache: dict[PassUse, PassTime] = {}

    @property
    def num_chunks(self) -> int:
        """See `Durations`."""
        sizes = self._pipeline.config.parallelism
        return sizes.pp * sizes.vpp

    def alone_s(self, chunk: int, *, is_forward: bool) -> float:
        """See `Durations`."""
        return self.of(PassUse(chunk, None) if is_forward else PassUse(None, chunk)).seconds

    def pair_s(self, forward_chunk: int, backward_chunk: int) -> float:
        """See `Durations`."""
        return self.of(PassUse(forward_chunk, backward_chunk)).seconds

    def message_s(self, forward_chunk: int | None, backward_chunk: int | None) -> float:
        """See `Durations`."""
        return self.of(PassUse(forward_chunk, backward_chunk)).message_s

    def of(self, use: PassUse) -> PassTime:
        """A pass or pair, with what the step adds to it."""
        found = self._cache.get(use)
        if found is None:
            found = self._cache[use] = self._with_more(use, self._plain(use))
        return found

    def _plain(self, use: PassUse) -> PassTime:
        forward, backward = use
        chunk = forward if forward is not None else backward
        assert chunk is not None, "a pass has a chunk"
        stage = chunk % self._pipeline.config.parallelism.pp
        passes = self._slow_passes if stage == self._slow_stage else self._passes
        if forward is not None and backward is not None:
            return passes.pair(forward, backward)
        return passes.alone(chunk, forward is not None)

    def _with_more(self, use: PassUse, plain: PassTime) -> PassTime:
        parts, waits = dict(plain.parts), self._pipeline.assumptions.code.waits_for_messages
        for cause, seconds in (
            (Cause.encoder, self._coupled_s(use)),
            (Cause.data_parallel, self._sharded_s(use, plain)),
            (Cause.pipeline, plain.message_s * waits),
        ):
            if seconds:
                parts[cause] = parts.get(cause, 0.0) + seconds
        message_s = 0.0 if waits else plain.message_s
        return replace(plain, seconds=sum(parts.values()), parts=parts, message_s=message_s)

    def _coupled_s(self, use: PassUse) -> float:
        """What a coupled tower takes in a pass through the first chunk."""
        slow = self._pipeline.assumptions.slow_node if self._slow_stage == 0 else 1.0
        forward_s, backward_s = (slow * each for each in self._tower_s)
        return (use.forward_chunk == 0) * forward_s + (use.backward_chunk == 0) * backward_s

    @cached_property
    def _tower_s(self) -> tuple[float, float]:
        return coupled_pass_s(self._pipeline)

    def _sharded_s(self, use: PassUse, plain: PassTime) -> float:
        """What a pass waits for weights that are cut over replicas: gathered for either direction, and their
        gradients reduced, while other layers compute; while the first layer's are gathered, none does."""
        code = self._pipeline.assumptions.code
        if code.sharding is not Sharding.weights:
            return 0.0
        weight_bytes = WEIGHT_BYTES[self._pipeline.config.train.dtype]
        total_s = first_s = 0.0
        for chunk, bytes_each in (
            (use.forward_chunk, weight_bytes),
            (use.backward_chunk, weight_bytes + code.gradient_bytes),
        ):
            if chunk is not None:
                seconds = chunk_exchange(self._pipeline, chunk, bytes_each).seconds
                total_s += seconds
                first_s += seconds / max(1, self._pipeline.layout.layers_per_chunk[chunk])
        return max(first_s, total_s - free_network_s(plain.seconds, plain.busy_s))


def free_network_s(seconds: float, busy_s: Mapping[str, float]) -> float:
    """Time of passes in which others may send: what the busier of network and NVLink leaves."""
    return seconds - max(busy_s.get("network", 0.0), busy_s.get("nvlink", 0.0))


def _with_slow_kernels(pipeline: PipelinePlan) -> PipelinePlan:
    """The same with kernels that take as long as on the slow node."""
    config = pipeline.config
    rates = config.cluster.rates
    slower = rates.calibration.kernels * pipeline.assumptions.slow_node
    calibration = replace(rates.calibration, kernels=slower)
    cluster = replace(config.cluster, rates=replace(rates, calibration=calibration))
    config = replace(config, cluster=cluster)
    stages = tuple(replace(stage, config=config) for stage in pipeline.stages)
    return replace(pipeline, config=config, stages=stages)
