"""The pipeline of a configuration: what each stage holds and which passes it runs; torch-free.

`plan_pipeline` derives it from the configuration once. Functions of the planner that count something for one
stage take its `StagePlan`, those for all stages take the `PipelinePlan`; all of them are pure.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from k25_train.config.schema import Config
from k25_train.parameters.megatron import (
    TrainedParameter,
    embedding_parameter,
    head_parameters,
    layer_parameters,
)
from k25_train.plan.assumptions import Assumptions, as_configured
from k25_train.plan.memo import Memo
from k25_train.plan.parameters import ModelParameters
from k25_train.plan.pass_sizes import PassSizes, balanced_sizes, largest_sizes
from k25_train.plan.stack_cost import stack_cost
from parallel.activations.order import offload_order
from parallel.config import ParallelismConfig
from parallel.pipeline.balance import plan_layout
from parallel.pipeline.layout import PipelineLayout, parse_layout
from parallel.pipeline.micro_batches import micro_batch_group_size
from parallel.pipeline.schedule import Pass, schedule_of


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """One model chunk of a pipeline stage."""

    layers: range
    """Its decoder layers, counted from 0 over the whole model."""
    is_first: bool
    """Whether it holds the embedding."""
    is_last: bool
    """Whether it holds the output head."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What every rank of one pipeline stage holds and runs in a step."""

    config: Config
    """The configuration that was planned."""
    assumptions: Assumptions
    """What else the plan assumes."""
    parameters: ModelParameters
    """Those of the whole model, the same object in all stages."""
    memo: Memo
    """What stages have in common is computed once."""
    stage: int
    """Position in the pipeline, counted from 0."""
    chunks: tuple[ChunkPlan, ...]
    """[virtual stage] -> model chunk."""
    num_micro_batches: int
    """Micro-batches of a step."""
    balanced_sizes: PassSizes
    """A micro-batch whose tokens are spread evenly over experts."""
    largest_sizes: PassSizes
    """The largest micro-batch that there can be."""

    @cached_property
    def passes(self) -> list[Pass]:
        """All passes of a step, in order."""
        return passes_of_stage(self.config.parallelism, self.num_micro_batches, self.stage)

    @cached_property
    def sampled_passes(self) -> list[Pass]:
        """The passes of a few micro-batches, at whose peaks as much is held as in a whole step."""
        return sample_of_passes(self.config.parallelism, self.num_micro_batches, self.stage)

    @cached_property
    def sampled_turns(self) -> tuple[tuple[int, bool, int, bool], ...]:
        """The same, those that run as one together: virtual stage of a forward pass, whether its activations
        stay on the device, and the same of a backward pass; -1 where there is none."""
        passes = self.sampled_passes
        stay = offload_order(passes, self.config.activation.passes_ahead).stay
        found: list[tuple[int, bool, int, bool]] = []
        for position, each in enumerate(passes):
            stays = each.key in stay
            if each.is_forward:
                found.append((each.vp_stage, stays, -1, False))
            elif position and passes[position - 1].overlaps_next:
                forward, forward_stays, _, _ = found.pop()
                found.append((forward, forward_stays, each.vp_stage, stays))
            else:
                found.append((-1, False, each.vp_stage, stays))
        return tuple(found)

    @cached_property
    def text_parameters(self) -> tuple[TrainedParameter, ...]:
        """The language model's parameters in the stage, in the order of its chunks."""
        return tuple(self._text_parameters())

    def _text_parameters(self) -> Iterator[TrainedParameter]:
        model = self.config.model
        for chunk in self.chunks:
            if chunk.is_first:
                yield embedding_parameter(model)
            for layer in chunk.layers:
                yield from layer_parameters(model, layer)
            if chunk.is_last:
                yield from head_parameters(model)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelinePlan:
    """The pipeline of a configuration."""

    config: Config
    """The configuration that was planned."""
    assumptions: Assumptions
    """What else the plan assumes."""
    layout: PipelineLayout
    """Decoder layers of every chunk."""
    stages: tuple[StagePlan, ...]
    """[pipeline rank] -> its stage."""
    num_micro_batches: int
    """Micro-batches of a step on each replica."""


def plan_pipeline(
    config: Config, num_micro_batches: int | None = None, assumptions: Assumptions | None = None
) -> PipelinePlan:
    """The pipeline of a configuration that satisfies its rules.

    Args:
        config: the configuration.
        num_micro_batches: of a step on each replica; what the global batch amounts to if None.
        assumptions: what else the plan assumes; what `as_configured` does if None. A model without a tower
            has no images in any case.
    """
    layout, assumptions = layout_of(config), assumptions or as_configured(config)
    if not config.model.has_vision:
        assumptions = replace(assumptions, vision_share=0.0)
    number = num_micro_batches or config.num_micro_batches
    balanced, largest = balanced_sizes(config, assumptions), largest_sizes(config, assumptions)
    parameters, memo = ModelParameters(config), Memo()
    stages = tuple(
        StagePlan(
            config=config,
            assumptions=assumptions,
            parameters=parameters,
            memo=memo,
            stage=stage,
            chunks=tuple(_chunk_plan(layout, stage, vp_stage) for vp_stage in range(layout.vpp)),
            num_micro_batches=number,
            balanced_sizes=balanced,
            largest_sizes=largest,
        )
        for stage in range(layout.pp)
    )
    return PipelinePlan(
        config=config, assumptions=assumptions, layout=layout, stages=stages, num_micro_batches=number
    )


def distinct_stages(pipeline: PipelinePlan) -> list[StagePlan]:
    """The first of each kind of stage: those that hold as many layers of either kind, and the same ends."""
    is_moe, found = pipeline.config.model.is_moe, dict[tuple[object, ...], StagePlan]()
    for stage in pipeline.stages:
        held = [
            (chunk.is_first, chunk.is_last, sum(map(is_moe, chunk.layers)), len(chunk.layers))
            for chunk in stage.chunks
        ]
        found.setdefault((stage.stage == 0, *sorted(held)), stage)
    return list(found.values())


def layout_of(config: Config) -> PipelineLayout:
    """The configured layout, or the one that balances the chunks' cost (`parallel.pipeline.balance`)."""
    parallelism, num_layers = config.parallelism, config.model.num_layers
    if parallelism.layout is not None:
        return parse_layout(parallelism.layout, num_layers, parallelism.pp, parallelism.vpp)
    cost = stack_cost(config.model, config.train, config.optim, config.cluster, parallelism)
    return plan_layout(cost, parallelism.pp, parallelism.vpp)


def passes_of_stage(parallelism: ParallelismConfig, num_micro_batches: int, stage: int) -> list[Pass]:
    """The passes of one stage in a step of so many micro-batches, in order."""
    return _passes(parallelism, num_micro_batches, _group_size(parallelism, num_micro_batches), stage)


def sample_of_passes(parallelism: ParallelismConfig, num_micro_batches: int, stage: int) -> list[Pass]:
    """Passes of one stage for a few of a step's micro-batches, which hold as much at a time as all do.

    A warm-up is followed by one group after another through all virtual stages, each like the one before it
    but the last, which may be smaller or larger.
    """
    if parallelism.vpp == 1:
        return _passes(parallelism, min(num_micro_batches, 4 * parallelism.pp + 4), 1, stage)
    group_size = _group_size(parallelism, num_micro_batches)
    sampled = min(num_micro_batches, 4 * group_size + num_micro_batches % group_size)
    return _passes(parallelism, sampled, group_size, stage)


def _chunk_plan(layout: PipelineLayout, stage: int, vp_stage: int) -> ChunkPlan:
    is_first, is_last = layout.is_first(stage, vp_stage), layout.is_last(stage, vp_stage)
    return ChunkPlan(layout.layer_ids(stage, vp_stage), is_first, is_last)


def _passes(
    parallelism: ParallelismConfig, num_micro_batches: int, group_size: int, stage: int
) -> list[Pass]:
    pp, vpp, overlaps = parallelism.pp, parallelism.vpp, parallelism.overlap_expert_comm
    return schedule_of(pp, vpp, num_micro_batches, group_size, stage, overlaps=overlaps)


def _group_size(parallelism: ParallelismConfig, num_micro_batches: int) -> int:
    if parallelism.vpp == 1:
        return num_micro_batches
    return micro_batch_group_size(num_micro_batches, parallelism.pp)
