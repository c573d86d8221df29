"""Build one rank of every pipeline stage, check what the whole job would build, and count its bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.pipeline_parallel.schedules import get_schedule_table

from k25_train.config.schema import Config
from k25_train.dryrun.group_members import Sizes
from k25_train.dryrun.groups import check_groups
from k25_train.dryrun.optimizer_shards import (
    CODE,
    Owned,
    check_buffers,
    check_built_state,
    encoder_owned_by_rank,
    owned_by_rank,
    state_costs,
)
from k25_train.dryrun.rank import BuiltRank, build_rank, bytes_of, gradient_buffers
from k25_train.dryrun.tensors import (
    Held,
    check_layers,
    check_tensors,
    check_total,
    count_by_part,
    count_updated,
    held_by,
)
from k25_train.errors import CheckpointError
from k25_train.model.megatron_config import TORCH_DTYPE
from k25_train.parameters.released import iterate_tensors
from k25_train.plan.context import with_exchange
from k25_train.plan.optimizer import encoder_parameters
from parallel.config import Problem
from parallel.pipeline.layout import PipelineLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSummary:
    """One pipeline stage. Its ranks differ in the experts they hold and the optimizer shard they update."""

    stage: int
    """Position in the pipeline, counted from 0."""
    layers: tuple[range, ...]
    """Decoder layers of each chunk."""
    parameters: dict[str, int]
    """Parameters of the stage by part, each counted once however many ranks hold it."""
    weights_bytes: int
    """Weights of each of its ranks: parameters with padding, and the modules' buffers."""
    gradients_bytes: int
    """Gradients of each of its ranks, float32 and with padding."""
    optimizer_bytes: tuple[int, ...]
    """[data-parallel rank] -> masters and moments."""
    num_buckets: int
    """Buckets in which a rank's gradients are reduced."""
    largest_bucket_bytes: int
    """Bytes of the largest of these buckets."""
    num_warmup_passes: int
    """Forward passes of a chunk before the first backward pass of a step."""

    @property
    def rank_bytes(self) -> int:
        """What the fullest of its ranks keeps; activations come on top."""
        return self.weights_bytes + self.gradients_bytes + max(self.optimizer_bytes)

    @property
    def fullest_dp_rank(self) -> int:
        """The first data-parallel rank with that much."""
        return self.optimizer_bytes.index(max(self.optimizer_bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What the job would build, and what is wrong with it."""

    stages: tuple[StageSummary, ...]
    """[pipeline rank] -> its stage in numbers."""
    problems: tuple[Problem, ...]
    """Everything that is wrong."""


def dry_run(config: Config, layout: PipelineLayout) -> DryRun:
    """Build the first rank of every stage, and hold all ranks against the configuration."""
    specs = {spec.name: spec for spec in iterate_tensors(config.model)}
    # Chosen once, not by each rank.
    config = with_exchange(config)
    ranks = [build_rank(config, layout, stage * config.dp_cp) for stage in range(config.parallelism.pp)]
    cut = config.parallelism
    sizes = Sizes(world=config.world_size, pp=cut.pp, ep=cut.ep, cp=cut.cp)
    problems = check_groups(ranks, sizes) + check_layers(ranks, config.model.num_layers)
    # Every rank has the same encoder, and rank 0 a piece of each kind of its optimizer state.
    of_encoder, uneven = encoder_owned_by_rank(ranks[0], state_costs(ranks[0])[0])
    problems += uneven
    problems += check_encoder(config, of_encoder)
    held: list[Held] = []
    stages = []
    for built in ranks:
        try:
            of_stage = list(held_by(built, config))
        except CheckpointError as error:
            where = f"tensors of stage {built.topology.pp_rank}"
            problems.append(Problem(where, None, str(error), "name them in k25_train/parameters/table.py"))
            of_stage = []
        held += of_stage
        counted = count_updated(of_stage, specs, config.optim)
        summary, found = summarize(built, count_by_part(of_stage, specs), counted, of_encoder)
        stages.append(summary)
        problems += found
    problems += check_tensors(held, specs, TORCH_DTYPE[config.train.dtype])
    problems += check_total([stage.parameters for stage in stages], config.model)
    problems += check_micro_batches(config, ranks)
    return DryRun(stages=tuple(stages), problems=tuple(problems))


def summarize(
    built: BuiltRank, parameters: dict[str, int], num_updated: int, of_encoder: Sequence[Owned]
) -> tuple[StageSummary, list[Problem]]:
    """A stage in numbers, and what is wrong with its buffers and optimizer shards.

    Args:
        parameters: of the stage, by part.
        num_updated: those that its ranks update among themselves.
        of_encoder: what every rank of the job updates of the decoupled encoder.
    """
    topology = built.topology
    costs, problems = state_costs(built)
    owned, uneven = owned_by_rank(built, costs)
    problems += uneven
    buckets = [
        (end - start) * buffer.grad_data.element_size()
        for module in built.modules
        for buffer, _ in gradient_buffers(module)
        for start, end in buffer.bucket_indices
    ]
    first = topology.pp_rank * topology.stage_size
    updated = sum(of_one.elements for of_one in owned)
    owned = [of_one + encoder for of_one, encoder in zip(owned, of_encoder[first:], strict=False)]
    if updated != num_updated:
        rule = f"must be {num_updated}, each of the stage's trained parameters by one of its ranks"
        problems.append(Problem(f"parameters updated in stage {topology.pp_rank}", updated, rule, CODE))
    of_rank = bytes_of(built.modules, built.optimizer)
    summary = StageSummary(
        stage=topology.pp_rank,
        layers=tuple(
            topology.layout.layer_ids(topology.pp_rank, chunk) for chunk in range(topology.vpp_size)
        ),
        parameters=parameters,
        weights_bytes=of_rank.weights,
        gradients_bytes=of_rank.gradients,
        optimizer_bytes=tuple(of_one.state_bytes for of_one in owned),
        num_buckets=len(buckets),
        largest_bucket_bytes=max(buckets, default=0),
        num_warmup_passes=built.num_warmup_passes,
    )
    return summary, problems + check_buffers(built) + check_built_state(built, owned[topology.stage_rank])


def check_encoder(config: Config, owned: Sequence[Owned]) -> list[Problem]:
    """Whether the ranks of the job together update of the decoupled encoder what the plan says is trained."""
    updated = sum(of_one.elements for of_one in owned)
    expected = sum(parameter.size for parameter in encoder_parameters(config))
    if updated == expected:
        return []
    rule = f"must be {expected}, each trained parameter of the decoupled encoder by one rank"
    return [Problem("parameters updated of the encoder", updated, rule, CODE)]


def check_micro_batches(config: Config, ranks: Sequence[BuiltRank]) -> list[Problem]:
    """Sequences of a step that are not all computed once, by megatron-core's order of micro-batches."""
    found = []
    sizes, train = config.parallelism, config.train
    computed = config.num_micro_batches * train.micro_batch_size * config.dp
    remedy = "change train.global_batch_size or train.micro_batch_size"
    if computed != train.global_batch_size:
        terms = f"{config.num_micro_batches} micro-batches x {train.micro_batch_size} x {config.dp} ranks"
        rule = f"must be what a step computes: {computed} = {terms}"
        found.append(Problem("train.global_batch_size", train.global_batch_size, rule, remedy))
    passes = config.num_micro_batches * sizes.vpp
    if sizes.vpp > 1:
        group_size = ranks[0].micro_batch_group_size
        order = get_schedule_table(config.num_micro_batches, sizes.vpp, group_size)
        if len(order) != passes or len(set(order)) != passes:
            rule = (
                f"must be {passes}: {config.num_micro_batches} micro-batches through {sizes.vpp} chunks each"
            )
            found.append(Problem("passes of the interleaved schedule", len(set(order)), rule, remedy))
    warmup = [built.num_warmup_passes for built in ranks]
    if warmup != sorted(warmup, reverse=True) or warmup[0] > passes:
        rule = f"must fall from stage to stage, from at most {passes}"
        found.append(Problem("warm-up passes of the stages", warmup, rule, remedy))
    return found
