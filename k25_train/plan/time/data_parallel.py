"""Gradients that are reduced and weights that are gathered over replicas of a stage; torch-free.

Replicas of experts are `ep` ranks apart.
While passes run, the exchange gets what these leave of network and NVLink.
"""

from dataclasses import dataclass

from k25_train.config.schema import Config
from k25_train.parameters.megatron import embedding_parameter, head_parameters, layer_parameters
from k25_train.plan.assumptions import Sharding
from k25_train.plan.pipeline import ChunkPlan, PipelinePlan, StagePlan
from k25_train.plan.time.expert_exchange import message_factor, nvlink_ranks
from k25_train.plan.time.ring import ring
from k25_train.plan.time.schedule import StepSchedule
from k25_train.plan.weight_bytes import WEIGHT_BYTES


@dataclass(frozen=True, slots=True)
class ChunkExchange:
    """What ranks send of one chunk, if nothing else is sent."""

    network_s: float
    """Seconds of a rank's network card."""
    nvlink_s: float
    """Seconds of its NVLink."""
    seconds: float
    """Duration: dense weights, then experts, each on both links concurrently."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataParallelTimes:
    """What the step waits for."""

    gathered_s: float
    """For weights, before passes can start."""
    reduced_s: float
    """For gradients, behind the last pass."""
    network_s: float
    """Seconds in which a rank's network card is in use for both, on the busiest stage."""
    nvlink_s: float
    """The same of NVLink."""


def data_parallel_times(
    pipeline: PipelinePlan, schedule: StepSchedule, free_share: list[float]
) -> DataParallelTimes:
    """What a step waits for next to its passes.

    Args:
        pipeline: what is planned.
        schedule: of its passes.
        free_share: [stage] -> share of the time of passes in which links are free.
    """
    if pipeline.assumptions.code.sharding is Sharding.weights:
        # Within passes (`step_durations`).
        return DataParallelTimes(gathered_s=0.0, reduced_s=0.0, network_s=0.0, nvlink_s=0.0)
    weight_bytes = WEIGHT_BYTES[pipeline.config.train.dtype]
    gathered = [_exchanges(pipeline, stage, weight_bytes) for stage in pipeline.stages]
    reduced = [
        _exchanges(pipeline, stage, pipeline.assumptions.code.gradient_bytes) for stage in pipeline.stages
    ]
    network_s = [sum(each.network_s for each in [*a, *b]) for a, b in zip(gathered, reduced, strict=True)]
    nvlink_s = [sum(each.nvlink_s for each in [*a, *b]) for a, b in zip(gathered, reduced, strict=True)]
    return DataParallelTimes(
        gathered_s=_gathered_s(pipeline, schedule, gathered, free_share),
        reduced_s=_reduced_s(pipeline, schedule, reduced, free_share),
        network_s=max(network_s),
        nvlink_s=max(nvlink_s),
    )


def chunk_exchange(pipeline: PipelinePlan, chunk: int, bytes_each: int) -> ChunkExchange:
    """What ranks reduce or gather of a chunk, counted in pipeline order, with so many bytes a weight."""
    vp_stage, stage = divmod(chunk, len(pipeline.stages))
    return _exchange(pipeline.config, pipeline.stages[stage].chunks[vp_stage], bytes_each)


def _exchanges(pipeline: PipelinePlan, stage: StagePlan, bytes_each: int) -> list[ChunkExchange]:
    return [_exchange(pipeline.config, chunk, bytes_each) for chunk in stage.chunks]


def _exchange(config: Config, chunk: ChunkPlan, bytes_each: int) -> ChunkExchange:
    sizes, factor = config.parallelism, message_factor(config)
    (dense, experts), near = _held(config, chunk), nvlink_ranks(config, config.dp_cp)
    network_s, nvlink_s, total_s = 0.0, 0.0, 0.0
    for num_weights, replicas, in_node in (
        (dense, config.dp_cp, near),
        (experts / sizes.ep, config.expert_dp, max(1, near // sizes.ep)),
    ):
        found = ring(config, factor * num_weights * bytes_each, replicas, in_node)
        network_s += found.network_s
        nvlink_s += found.nvlink_s
        total_s += found.seconds
    return ChunkExchange(network_s, nvlink_s, total_s)


def _held(config: Config, chunk: ChunkPlan) -> tuple[int, int]:
    """Dense weights and experts of a chunk, as far as they are trained."""
    model, dense, experts = config.model, 0, 0
    if not config.optim.language_model.trained:
        return 0, 0
    held = [each for layer in chunk.layers for each in layer_parameters(model, layer)]
    held += [embedding_parameter(model)] if chunk.is_first else []
    held += head_parameters(model) if chunk.is_last else []
    for each in held:
        if each.is_expert:
            experts += each.size
        else:
            dense += each.size
    return dense, experts


def _reduced_s(
    pipeline: PipelinePlan,
    schedule: StepSchedule,
    reduced: list[list[ChunkExchange]],
    free_share: list[float],
) -> float:
    """A layer's gradients are reduced once its last backward pass is over; what ends after the last pass of
    the step is waited for."""
    timeline, overlaps, ends_s = schedule.timeline, pipeline.config.parallelism.overlap_grad_reduce, []
    for stage, passes in enumerate(timeline.schedules):
        last_s = [(0.0, 0.0)] * len(reduced[stage])
        for each, *times_s in zip(passes, timeline.starts_s[stage], timeline.ends_s[stage], strict=True):
            last_s[each.vp_stage] = max(last_s[each.vp_stage], (times_s[0], times_s[1]))
        passes_end_s = timeline.rank_ends_s[stage]
        ready = []
        for chunk, (start_s, end_s), exchange in zip(
            pipeline.stages[stage].chunks, last_s, reduced[stage], strict=True
        ):
            layers = max(1, len(chunk.layers))
            for number in range(1, layers + 1):
                begin_s = start_s + number / layers * (end_s - start_s) if overlaps else passes_end_s
                ready.append((begin_s, exchange.seconds / layers))
        done_s = 0.0
        for begin_s, seconds in sorted(ready):
            done_s = sent_at_s(max(done_s, begin_s), seconds, passes_end_s, free_share[stage])
        ends_s.append(done_s)
    return max(0.0, max(ends_s) - timeline.makespan_s)


def _gathered_s(
    pipeline: PipelinePlan,
    schedule: StepSchedule,
    gathered: list[list[ChunkExchange]],
    free_share: list[float],
) -> float:
    """Layers' weights are gathered in the order of passes from the start of the step; each stage starts
    later by what its first passes wait for."""
    timeline, waits_s = schedule.timeline, [0.0]
    overlaps = pipeline.config.parallelism.overlap_param_gather
    for stage, passes in enumerate(timeline.schedules):
        first_s = [(timeline.makespan_s, timeline.makespan_s)] * len(gathered[stage])
        for each, *times_s in zip(passes, timeline.starts_s[stage], timeline.ends_s[stage], strict=True):
            first_s[each.vp_stage] = min(first_s[each.vp_stage], (times_s[0], times_s[1]))
        stage_start_s, done_s = min(first_s)[0], 0.0
        for chunk, (start_s, end_s), exchange in zip(
            pipeline.stages[stage].chunks, first_s, gathered[stage], strict=True
        ):
            layers = max(1, len(chunk.layers))
            seconds = exchange.seconds / layers
            for number in range(layers):
                # Free until the first pass starts, and shared with passes from then on.
                before_s = min(seconds, max(0.0, stage_start_s - done_s))
                done_s += before_s + (seconds - before_s) / free_share[stage]
                need_s = start_s + number / layers * (end_s - start_s) if overlaps else 0.0
                waits_s.append(done_s - need_s)
    return max(waits_s)


def sent_at_s(begin_s: float, seconds: float, passes_end_s: float, free_share: float) -> float:
    """When something is sent that takes so long alone, if passes run until then and then."""
    meanwhile_s = max(0.0, passes_end_s - begin_s) * free_share
    if seconds <= meanwhile_s:
        return begin_s + seconds / free_share
    return max(begin_s, passes_end_s) + seconds - meanwhile_s
