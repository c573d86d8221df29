"""Muon's extra work and traffic at the real 1T shapes: balance between ranks, and bytes next to AdamW's.

    python -m tests.bench.muon_balance [OVERRIDE ...]

For 256 and 2,048 ranks the optimizer of each pipeline stage is built on tensors without data, and what it
plans is taken down: which rank orthogonalises which matrix, out of whose pieces. Imbalance is the most over
the mean of the ranks' Newton-Schulz FLOPs. The step waits for the slowest of all ranks, and the bar is for
those, the decoupled encoder's matrices included; where a stage has little to do, one of its matrices can
weigh more than the mean.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.plan.optimizer import encoder_parameters, stage_parameters
from k25_train.plan.pipeline import PipelinePlan, StagePlan, plan_pipeline
from k25_train.plan.weight_bytes import GRADIENT_BYTES, WEIGHT_BYTES
from k25_train.startup.platform import prepare_platform
from parallel.muon.plan import Matrix, plan_owners
from parallel.pipeline.layout import PipelineLayout
from tests.helpers.forward_flops import text_forward_flops

NODES = (32, 256)
"""Of 8 GPUs: 256 and 2,048 ranks."""
BAR = 1.10
EXCHANGE_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Plan:
    """Matrices and their owners, by data-parallel rank."""

    matrices: Sequence[Matrix]
    owners: Sequence[int]
    flops: Sequence[int]
    """[rank] -> Newton-Schulz FLOPs of a step, those of matrices planned before included."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What the data-parallel ranks of one pipeline stage do."""

    flops: list[int]
    exchanged: list[int]
    """[rank] -> elements sent: pieces to owners and results back."""
    adamw_bytes: float
    """Bytes that each rank sends of gradients (reduce-scatter) and weights (all-gather), as with AdamW."""


def main() -> None:
    """Print the figures next to the bar; ends non-zero if it is missed."""
    prepare_platform("meta")
    kept = True
    for nodes in NODES:
        real = ["experiment=k25_pretrain_4k", f"cluster.nodes={nodes}"]
        config = compose([*real, *sys.argv[1:]])
        pipeline = plan_pipeline(config)
        stages = list(plan_stages(pipeline))
        Console(width=110).print(stage_table(config, stages))
        kept &= print_job(config, with_encoder(config, pipeline.layout, stages))
    sys.exit(not kept)


def plan_stages(pipeline: PipelinePlan) -> Iterator[Stage]:
    """Every stage; those with parameters of the same shapes are planned once."""
    known: dict[tuple[tuple[int, ...], ...], Stage] = {}
    for stage in pipeline.stages:
        shapes = tuple(parameter.shape for parameter in stage_parameters(stage))
        if shapes not in known:
            known[shapes] = plan_stage(pipeline.layout, stage)
        yield known[shapes]


def plan_stage(layout: PipelineLayout, stage: StagePlan) -> Stage:
    """What the training code plans for the data-parallel ranks of a stage."""
    config = stage.config
    dense, experts, *_ = recorded_plans(config, layout, stage.stage)
    sent = zip(elements_sent(dense, config.dp), elements_sent(experts, config.dp), strict=True)
    return Stage(list(experts.flops), list(map(sum, sent)), adamw_bytes(stage))


def with_encoder(config: Config, layout: PipelineLayout, stages: Sequence[Stage]) -> list[Stage]:
    """The stages with what their ranks do for the decoupled encoder."""
    _, _, *encoder = recorded_plans(config, layout, 0)
    if not encoder:
        return list(stages)
    # In a run, ranks tell each other what they have to do before they divide the encoder's matrices.
    busy = [flops for stage in stages for flops in stage.flops]
    matrices, steps = encoder[0].matrices, config.optim.muon.newton_schulz_steps
    owners, flops = plan_owners(matrices, config.world_size, steps, busy)
    sent = elements_sent(Plan(matrices, owners, flops), config.world_size)
    each = GRADIENT_BYTES + WEIGHT_BYTES[config.train.dtype]
    num_weights = sum(parameter.size for parameter in encoder_parameters(config))
    adamw = num_weights * each * (config.world_size - 1) / config.world_size
    found = []
    for number, stage in enumerate(stages):
        own = slice(number * config.dp, (number + 1) * config.dp)
        found.append(
            Stage(
                flops[own],
                [of_stage + more for of_stage, more in zip(stage.exchanged, sent[own], strict=True)],
                stage.adamw_bytes + adamw,
            )
        )
    return found


def recorded_plans(config: Config, layout: PipelineLayout, stage: int) -> list[Plan]:
    """What the optimizer of a stage's first rank plans: for dense matrices, then for experts' as well, then
    for those of the decoupled encoder, if there is one, over all ranks of the job."""
    from k25_train.dryrun.rank import build_rank
    from k25_train.optim import muon

    plans = []

    def record(matrices: Sequence[Matrix], num_ranks: int, steps: int, busy: Sequence[int] = ()) -> Any:
        owners, flops = plan_owners(matrices, num_ranks, steps, busy)
        plans.append(Plan(matrices, owners, flops))
        return owners, flops

    with patch.object(muon, "plan_owners", record):
        build_rank(config, layout, stage * config.dp)
    return plans


def elements_sent(plan: Plan, num_ranks: int) -> list[int]:
    """[rank] -> elements of pieces sent to owners and of results sent back by owners."""
    sent = [0] * num_ranks
    for matrix, owner in zip(plan.matrices, plan.owners, strict=True):
        for holder, size in matrix.pieces:
            if holder != owner:
                sent[holder] += size
                sent[owner] += size
    return sent


def adamw_bytes(stage: StagePlan) -> float:
    """Bytes that a rank sends for the gradients and weights of its parameters, as a ring does."""
    config, total = stage.config, 0.0
    for parameter in stage_parameters(stage):
        num_replicas = config.expert_dp if parameter.is_expert else config.dp
        num_weights = parameter.size // (config.parallelism.ep if parameter.is_expert else 1)
        each = GRADIENT_BYTES + WEIGHT_BYTES[config.train.dtype]
        total += num_weights * each * (num_replicas - 1) / num_replicas
    return total


def stage_table(config: Config, stages: Sequence[Stage]) -> Table:
    """Stages that differ, one row each."""
    title = f"{config.world_size:,} ranks: dp {config.dp}, experts {config.expert_dp}"
    table = Table("stages", "TFLOPs a rank, mean", "most", "most / mean in the stage", title=title)
    for stage in dict.fromkeys(map(id, stages)):
        alike = [number for number, other in enumerate(stages) if id(other) == stage]
        flops = stages[alike[0]].flops
        name = str(alike[0]) if len(alike) == 1 else f"{alike[0]}-{alike[-1]}"
        table.add_row(
            name, f"{mean(flops) / 1e12:.2f}", f"{max(flops) / 1e12:.2f}", f"{imbalance(flops):.3f}"
        )
    return table


def print_job(config: Config, stages: Sequence[Stage]) -> bool:
    """Figures over all ranks; whether the bar is kept."""
    flops = [number for stage in stages for number in stage.flops]
    figure = imbalance(flops)
    kept = figure <= BAR
    sequence = text_forward_flops(config.model, [config.train.seq_len])
    whole = 3 * sequence * config.train.global_batch_size / config.world_size
    print(f"most / mean over all ranks: {figure:.3f}, bar {BAR:.2f}: {'kept' if kept else 'MISSED'}")
    print(f"Newton-Schulz FLOPs of the busiest rank: {max(flops) / whole:.2%} of a rank's model FLOPs")
    adamw = [stage.adamw_bytes for stage in stages for _ in stage.flops]
    print(f"gradients and weights, as with AdamW: mean {mean(adamw) / 1e9:.2f} GB sent a rank and step")
    for dtype, size in EXCHANGE_BYTES.items():
        sent = [number * size for stage in stages for number in stage.exchanged]
        ratio = (mean(adamw) + mean(sent)) / mean(adamw)
        print(
            f"exchange in {dtype}: mean {mean(sent) / 1e9:.2f} GB, most {max(sent) / 1e9:.2f} GB; "
            f"{ratio:.2f} of AdamW's in all"
        )
    return kept


def imbalance(flops: Sequence[int]) -> float:
    """Largest over mean."""
    return max(flops) / mean(flops)


if __name__ == "__main__":
    main()
