"""The least time that a step can take, without simulating its schedule; torch-free.

A stage starts when the first micro-batch has passed all chunks before its first one, then runs its passes,
and the last micro-batch still has to go back through the chunks before it. What comes around the passes is
added. Only waits in between are left out, and what is exposed of gradients and messages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from k25_train.config.basics import ranks_of_stage
from k25_train.config.model import ModelConfig
from k25_train.config.optimizer import OptimizerOffload
from k25_train.config.schema import Config
from k25_train.plan.kernels.work import Setting
from k25_train.plan.pipeline import PipelinePlan, layout_of, plan_pipeline
from k25_train.plan.search.candidates import config_of
from k25_train.plan.search.memory_floor import least_bytes, passes_bytes, with_outside
from k25_train.plan.search.space import Candidate, Layout
from k25_train.plan.search.trial import Planner
from k25_train.plan.search.uses import Uses, uses_of
from k25_train.plan.time.between_steps import host_part
from k25_train.plan.time.chunk_nodes import ChunkKind, Device, PartNodes
from k25_train.plan.time.encoder import coupled_pass_s, encoder_plan
from k25_train.plan.time.optimizer import optimizer_part
from k25_train.plan.time.passes import PassTimes, pass_times
from parallel.config import DepMode, DepSchedule
from parallel.dispatcher import Dispatcher

JUST_BELOW = 1 - 1e-9
"""Sums in another order differ by rounding."""
Seconds = Callable[[int | None, int | None], float]
"""The least that a forward pass of one chunk, a backward pass of another, or both overlapped, take; chunks
are in pipeline order."""


def step_floor_s(uses: Uses, seconds: Seconds, tower_s: float = 0.0) -> float:
    """The least seconds of a step's passes.

    Args:
        uses: what stages run.
        seconds: how long that takes at least.
        tower_s: what a coupled tower adds to both passes of a micro-batch in the first chunk.
    """
    least_s = before_s = 0.0
    for stage, of_stage in enumerate(uses):
        own_s = sum(number * seconds(*use) for use, number in of_stage.items())
        if stage == 0:
            own_s += tower_s * sum(number for (forward, _), number in of_stage.items() if forward == 0)
        least_s = max(least_s, before_s + own_s)
        before_s += seconds(stage, None) + seconds(None, stage) + (tower_s if stage == 0 else 0.0)
    return least_s


def chunk_kinds(counts: Sequence[int], model: ModelConfig) -> list[ChunkKind]:
    """What the time of each chunk depends on.

    Args:
        counts: [chunk, in pipeline order] -> its layers.
        model: dimensions.
    """
    found, first = list[ChunkKind](), 0
    for chunk, count in enumerate(counts):
        num_dense = min(max(model.num_dense_layers - first, 0), count)
        found.append(ChunkKind(num_dense, count - num_dense, chunk == 0, chunk == len(counts) - 1))
        first += count
    return found


@dataclass
class KernelFloors:
    """Floors from the kernels and passes of a plan. What layouts have in common is kept."""

    _counts: dict[object, list[ChunkKind]] = field(default_factory=dict)
    _devices: dict[object, Device] = field(default_factory=dict)
    _passes: dict[object, PassTimes] = field(default_factory=dict)
    _around: dict[object, float] = field(default_factory=dict)
    _steps: dict[object, float] = field(default_factory=dict)
    _states: dict[object, tuple[float, float, float, float]] = field(default_factory=dict)
    _of_passes: dict[object, dict[int, float]] = field(default_factory=dict)
    _layouts: dict[object, str] = field(default_factory=dict)
    _optimizers: dict[object, float] = field(default_factory=dict)
    _towers: dict[object, float] = field(default_factory=dict)

    def of_layout(self, planner: Planner, layout: Layout, activation: str) -> float:
        """See `Floors`: kernels of passes, and exchanges."""
        choice = planner.least_choice._replace(activation=activation)
        candidate = Candidate(layout, choice)
        config = config_of(planner.config, candidate, planner.offer)
        key = layout.ep, layout.micro_batch_size, layout.dispatcher, activation, layout.cp, layout.exchange
        if key not in self._devices:
            self._devices[key] = Device(Setting.of(self._pipeline(planner, candidate).stages[0]))
        of_kind = {kind: _of_nodes(self._devices[key], kind) for kind in set(self._kinds(config, layout))}
        kinds = self._kinds(config, layout)

        def seconds(forward: int | None, backward: int | None) -> float:
            ahead = NOTHING if forward is None else of_kind[kinds[forward]][0]
            back = NOTHING if backward is None else of_kind[kinds[backward]][1]
            computed_s, exchanged_s = ahead.computed_s + back.computed_s, ahead.sent_s + back.sent_s
            if forward is not None and backward is not None:
                return max(computed_s, exchanged_s)
            # One after the other, but for weights' gradients if they may be late.
            late_s = back.late_s if layout.delays else 0.0
            return max(computed_s, computed_s - late_s + exchanged_s)

        return step_floor_s(self._uses(config, layout), seconds)

    def of_candidate(self, planner: Planner, candidate: Candidate) -> float:
        """See `Floors`: the passes themselves, and the encoder around them."""
        layout, choice = candidate
        config = config_of(planner.config, candidate, planner.offer)
        kinds = self._kinds(config, layout)
        key = layout.ep, layout.micro_batch_size, layout.dispatcher, layout.delays, choice.activation
        key_of_passes = (*key, layout.pp == 1, layout.cp, layout.exchange)
        if key_of_passes not in self._passes:
            self._passes[key_of_passes] = pass_times(self._pipeline(planner, candidate))
        passes = self._passes[key_of_passes]

        def seconds(forward: int | None, backward: int | None) -> float:
            ahead = None if forward is None else kinds[forward]
            return passes.of_kinds(ahead, None if backward is None else kinds[backward]).seconds

        around = (
            layout.pp,
            layout.micro_batch_size,
            layout.ep,
            choice.mode,
            choice.schedule,
            layout.cp,
        )
        if around not in self._around:
            pipeline = self._pipeline(planner, candidate)
            encoder = encoder_plan(pipeline, float("inf"))
            self._towers[around] = sum(coupled_pass_s(pipeline))
            self._around[around] = encoder.around_s + encoder.weights_s + host_part(pipeline).seconds
        # What lies around passes changes nothing in them.
        of_passes = (layout, choice.activation, choice.mode)
        if of_passes not in self._steps:
            uses = self._uses(config, layout)
            self._steps[of_passes] = step_floor_s(uses, seconds, self._towers[around])
        return (
            self._steps[of_passes] + self._around[around] + self._optimizer_s(planner, candidate)
        ) * JUST_BELOW

    def _optimizer_s(self, planner: Planner, candidate: Candidate) -> float:
        key = *candidate.layout.group, candidate.choice.offload, candidate.choice.mode
        if key not in self._optimizers:
            self._optimizers[key] = optimizer_part(self._pipeline(planner, candidate)).seconds
        return self._optimizers[key]

    def states_bytes(self, planner: Planner, candidate: Candidate) -> float:
        """See `Floors`: the language model's weights, gradients, and optimizer state on the device, without
        padding."""
        return max(self._stage_states(planner, candidate))

    def _stage_states(self, planner: Planner, candidate: Candidate) -> list[float]:
        layout, choice = candidate
        config, on_device = planner.config, choice.offload is OptimizerOffload.none
        dp = ranks_of_stage(config.world_size, layout.pp)
        key = layout.ep, dp, on_device
        if key not in self._states:
            self._states[key] = least_bytes(config, layout.ep, dp, on_device=on_device)
        dense, moe, first, last = self._states[key]
        kinds = self._kinds(config_of(config, candidate, planner.offer), layout)
        of_chunks = [
            kind.num_dense * dense + kind.num_moe * moe + kind.is_first * first + kind.is_last * last
            for kind in kinds
        ]
        return [sum(of_chunks[stage :: layout.pp]) for stage in range(layout.pp)]

    def device_bytes(self, planner: Planner, candidate: Candidate) -> float:
        """See `Floors`: of the first two stages, which hold the most micro-batches, and the last one, in the
        pipeline's passes, without padding, images' features and the encoder, wherever that is."""
        layout, choice = candidate
        # Whether weights' gradients come later makes no difference, nor which library sends tokens.
        has_library = layout.dispatcher is not Dispatcher.alltoall
        key = layout.group, layout.micro_batch_size, has_library, layout.overlaps
        key_of_passes = (*key, choice.activation, layout.exchange)
        if key_of_passes not in self._of_passes:
            least = choice._replace(mode=DepMode.decoupled, schedule=DepSchedule.bubbles)
            stages = self._pipeline(planner, Candidate(layout, least)).stages
            fullest = {stage.stage: stage for stage in (*stages[:2], stages[-1])}
            self._of_passes[key_of_passes] = {each: passes_bytes(stage) for each, stage in fullest.items()}
        states = self._stage_states(planner, candidate)
        tensors = max(
            states[stage] + of_passes for stage, of_passes in self._of_passes[key_of_passes].items()
        )
        return with_outside(
            config_of(planner.config, candidate, planner.offer), planner.assumptions.code, tensors
        )

    def _pipeline(self, planner: Planner, candidate: Candidate) -> PipelinePlan:
        """That of a candidate, without balancing its layers once more."""
        config = config_of(planner.config, candidate, planner.offer)
        self._kinds(config, candidate.layout)
        text = self._layouts[candidate.layout.group]
        config = replace(config, parallelism=replace(config.parallelism, layout=text))
        return plan_pipeline(config, assumptions=planner.assumptions)

    def _kinds(self, config: Config, layout: Layout) -> list[ChunkKind]:
        if layout.group not in self._counts:
            found = layout_of(config)
            self._layouts[layout.group] = found.to_megatron()
            self._counts[layout.group] = chunk_kinds(found.layers_per_chunk, config.model)
        return self._counts[layout.group]

    def _uses(self, config: Config, layout: Layout) -> Uses:
        return uses_of(layout.pp, layout.vpp, config.num_micro_batches, overlaps=layout.overlaps)


class _Half(NamedTuple):
    """What one direction of a pass takes at least, in seconds."""

    computed_s: float
    """Kernels on the stream of computation."""
    sent_s: float
    """What is on that of the exchanges."""
    late_s: float
    """Of the kernels, those that may run during exchanges of the same pass."""


NOTHING = _Half(0.0, 0.0, 0.0)


def _of_nodes(device: Device, kind: ChunkKind) -> tuple[_Half, _Half]:
    """Kernels and exchanges of a chunk, forward and backward."""
    found = []
    for is_forward in (True, False):
        computed_s = sent_s = late_s = 0.0
        for number, is_moe in ((kind.num_dense, False), (kind.num_moe, True)):
            if number:
                layer = device.moe if is_moe else device.dense
                computed_s += number * _seconds(layer.attention, is_forward)
                computed_s += number * _seconds(layer.experts, is_forward)
                late_s += number * (layer.attention.weights.seconds + layer.experts.weights.seconds)
                sent_s += number * (layer.dispatch if is_forward else layer.combine).seconds
                sent_s += number * (layer.combine.seconds + _seconds(layer.combined, is_forward))
        for is_there, ends in ((kind.is_first, device.first), (kind.is_last, device.last)):
            computed_s += _seconds(ends, is_forward) if is_there else 0.0
        found.append(_Half(computed_s, sent_s, late_s))
    return found[0], found[1]


def _seconds(nodes: PartNodes, is_forward: bool) -> float:
    return nodes.forward.seconds if is_forward else nodes.backward.seconds + nodes.weights.seconds
