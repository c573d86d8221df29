"""Rows of a step's budget that come from the order of passes; torch-free.

The schedule is simulated twice: with the times of layers alone, and with what passes take in addition that no
other hides. The first one's waits are the pipeline's idle time, and what the second takes longer is the
exchange while the pipeline fills and drains, so that nothing is counted twice.

What a pass alone does not hide: exchanges forward, and backward those that its own weight gradients do not
hide if they are delayed; and the message to the next stage, which an overlapped pass sends during its other
half (megatron-core 0.19.2, `model_chunk_schedule_plan.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from k25_train.config.schema import Config
from k25_train.parameters.megatron import embedding_parameter, head_parameters, layer_parameters
from k25_train.plan.pipeline import ChunkPlan, PipelinePlan, StagePlan
from k25_train.plan.time.budget_row import BudgetRow
from k25_train.plan.time.expert_exchange import expert_exchange
from k25_train.plan.time.step import (
    NVLINK_GB_PER_S,
    StepTimes,
    flops_per_s,
    network_bytes_per_s,
    step_times,
)
from k25_train.plan.weight_bytes import GRADIENT_BYTES, WEIGHT_BYTES
from k25_train.units import GB
from parallel.pipeline.simulator import simulate
from parallel.pipeline.timeline import ChunkSeconds, Timeline


@dataclass(frozen=True, slots=True)
class _LongerAlone:
    """`Durations` of passes that take longer if they do not overlap."""

    seconds: ChunkSeconds
    more: ChunkSeconds

    @property
    def num_chunks(self) -> int:
        return self.seconds.num_chunks

    def alone_s(self, chunk: int, *, is_forward: bool) -> float:
        more_s = self.more.alone_s(chunk, is_forward=is_forward)
        return self.seconds.alone_s(chunk, is_forward=is_forward) + more_s

    def pair_s(self, forward_chunk: int, backward_chunk: int) -> float:
        return self.seconds.pair_s(forward_chunk, backward_chunk)


@dataclass(frozen=True)
class ScheduleBudget:
    """When the passes of a step run."""

    pipeline: PipelinePlan
    """The plan of the step."""

    @cached_property
    def times(self) -> StepTimes:
        """Passes without images."""
        return step_times(self.pipeline)

    @cached_property
    def stage(self) -> StagePlan:
        """The stage that computes the longest."""
        return max(self.pipeline.stages, key=self.computes_s)

    @cached_property
    def model_s(self) -> float:
        """Seconds of the model's FLOPs, spread evenly over all ranks."""
        return sum(map(self.computes_s, self.pipeline.stages)) / len(self.pipeline.stages)

    @cached_property
    def real(self) -> Timeline:
        """Passes with what those have in addition that no other hides."""
        alone, passes = self._alone(), [stage.passes for stage in self.pipeline.stages]
        seconds = self.times.seconds
        return simulate(passes, seconds if alone is None else _LongerAlone(seconds, alone))

    @property
    def idle_s(self) -> float:
        """How long the busiest stage waits for others."""
        return self.times.text.makespan_s - self.computes_s(self.stage)

    def computes_s(self, stage: StagePlan) -> float:
        """Seconds of the model's FLOPs on a rank of a stage."""
        seconds = self.times.seconds
        passes_s = sum(seconds.forward_s[chunk] + seconds.backward_s[chunk] for chunk in self._chunks(stage))
        return passes_s * self.pipeline.num_micro_batches

    def rows(self) -> Iterator[BudgetRow]:
        """What ranks wait for."""
        busiest_s, ideal_s = self.computes_s(self.stage), self.times.text.makespan_s
        counts = sorted({sum(len(chunk.layers) for chunk in stage.chunks) for stage in self.pipeline.stages})
        told = f"stages have {' to '.join(map(str, counts))} layers, and the last one the head"
        yield BudgetRow("stages that compute less", busiest_s - self.model_s, told)
        told = "simulated schedule, less the busiest stage's passes"
        yield BudgetRow("pipeline's idle time", self.idle_s, told)
        if self.pipeline.config.parallelism.overlap_expert_comm:
            told = "the same with exchanges and messages that no other pass hides"
            yield BudgetRow("exchange, fill and drain", self.real.makespan_s - ideal_s, told)
        yield self._reduced()
        yield self._gathered()

    def _chunks(self, stage: StagePlan) -> range:
        return range(stage.stage, len(self.times.seconds.forward_s), len(self.pipeline.stages))

    def _alone(self) -> ChunkSeconds | None:
        """[chunk] -> what passes take that overlap with no other; None if no pass overlaps anyway."""
        config = self.pipeline.config
        if not config.parallelism.overlap_expert_comm:
            return None
        each_s = expert_exchange(config).seconds
        hidden_s = _expert_product_s(self.stage) if config.parallelism.delay_wgrad else 0.0
        num_bytes = self.stage.balanced_sizes.tokens * config.model.hidden_size
        message_s = num_bytes * WEIGHT_BYTES[config.train.dtype] / network_bytes_per_s(config)
        forward_s, backward_s, start = [], [], 0
        for count in self.pipeline.layout.layers_per_chunk:
            num_moe = sum(config.model.is_moe(layer) for layer in range(start, start + count))
            start += count
            forward_s.append(2 * each_s * num_moe + message_s)
            backward_s.append((each_s + max(0.0, each_s - hidden_s)) * num_moe + message_s)
        return ChunkSeconds(forward_s=tuple(forward_s), backward_s=tuple(backward_s))

    def _reduced(self) -> BudgetRow:
        """A chunk's gradients are reduced once its last backward pass is over; what ends after the last pass
        of the step is shown."""
        config, ends_s = self.pipeline.config, []
        for stage in self.pipeline.stages:
            last_s = [0.0] * len(stage.chunks)
            for each, end_s in zip(stage.passes, self.real.ends_s[stage.stage], strict=True):
                last_s[each.vp_stage] = max(last_s[each.vp_stage], end_s)
            if not config.parallelism.overlap_grad_reduce:
                last_s = [self.real.rank_ends_s[stage.stage]] * len(stage.chunks)
            done_s = 0.0
            for begin_s, chunk in sorted(zip(last_s, stage.chunks, strict=True), key=lambda pair: pair[0]):
                done_s = max(done_s, begin_s) + _shared_s(config, chunk, GRADIENT_BYTES)
            ends_s.append(done_s)
        shown_s = max(0.0, max(ends_s) - self.real.makespan_s)
        return BudgetRow("gradients reduced", shown_s, "what ends after the last pass")

    def _gathered(self) -> BudgetRow:
        """Chunks' weights are gathered in the order of passes from the start of the step; each stage starts
        later by what its first passes wait for."""
        config, waits_s = self.pipeline.config, [0.0]
        for stage in self.pipeline.stages:
            first_s = [self.real.makespan_s] * len(stage.chunks)
            for each, start_s in zip(stage.passes, self.real.starts_s[stage.stage], strict=True):
                first_s[each.vp_stage] = min(first_s[each.vp_stage], start_s)
            if not config.parallelism.overlap_param_gather:
                first_s = [0.0] * len(stage.chunks)
            done_s = 0.0
            for need_s, chunk in zip(first_s, stage.chunks, strict=True):
                done_s += _shared_s(config, chunk, WEIGHT_BYTES[config.train.dtype])
                waits_s.append(done_s - need_s)
        return BudgetRow("weights gathered", max(waits_s), "what passes wait for, a chunk at a time")


def _expert_product_s(stage: StagePlan) -> float:
    """How long the weight gradients of a layer's experts are computed."""
    model = stage.config.model
    products = 2 * 3 * model.hidden_size * model.expert_ffn_hidden_size
    return products * stage.balanced_sizes.expert_rows / flops_per_s(stage.config)


def _shared_s(config: Config, chunk: ChunkPlan, weight_bytes: int) -> float:
    """How long ranks reduce or gather a chunk's weights.

    A ring passes through all ranks of a node before it leaves it, and there are as many rings as cards: of
    what neighbours share, a card carries its part alone. Replicas of experts are `ep` ranks apart.
    """
    sizes, model = config.parallelism, config.model
    held = [each for layer in chunk.layers for each in layer_parameters(model, layer)]
    held += [embedding_parameter(model)] if chunk.is_first else []
    held += head_parameters(model) if chunk.is_last else []
    experts = sum(each.size for each in held if each.is_expert)
    dense = sum(each.size for each in held) - experts
    gpus, total_s = config.cluster.gpus_per_node, 0.0
    for num_weights, replicas, in_node in (
        (dense, config.dp, min(config.dp, gpus)),
        (experts / sizes.ep, config.expert_dp, max(1, min(config.dp, gpus) // sizes.ep)),
    ):
        sent = num_weights * weight_bytes * (replicas - 1) / replicas
        over_network = sent / in_node if replicas > in_node else 0.0
        over_nvlink = sent if in_node > 1 else 0.0
        total_s += max(over_network / network_bytes_per_s(config), over_nvlink / (GB * NVLINK_GB_PER_S))
    return total_s
