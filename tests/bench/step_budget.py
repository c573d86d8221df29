"""Where the time of a step of `k25_pretrain_4k` goes on 256, 2,048 and 4,096 GPUs, computed from the plan.

    python -m tests.bench.step_budget [SECTION.KEY=VALUE ...]

Prints a table for each size, the best of a few legal overrides that fit, and last the share of everything
that is not the model's FLOPs, next to its bar. Nothing is measured: sources and assumptions are in
`k25_train/plan/time/budget*.py`.
"""

import sys
from collections.abc import Sequence

from rich.console import Console

from k25_train.compose.resolve import compose
from k25_train.plan.memory.remedies import SPARE_BYTES
from k25_train.plan.memory.stage import fullest, room_bytes, stage_memories
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.report.time import budget_table
from k25_train.plan.time.budget import StepBudget

EXPERIMENT = "experiment=k25_pretrain_4k"
BARS = {256: 0.08, 2048: None, 4096: 0.15}
"""GPUs -> the most that everything but the model's FLOPs may take, over these."""
DEEPER = ("parallelism.pp=8", "parallelism.vpp=4", "parallelism.ep=32")
"""Half the stages, each with as many weights, since twice as many ranks share experts."""
CANDIDATES = tuple(
    (f"parallelism.dispatcher={kind}", *layout)
    for kind in ("hybridep", "alltoall")
    for layout in ((), DEEPER, ("parallelism.pp=8", "parallelism.vpp=2", "parallelism.ep=32"))
)
"""Overrides of which the best that fits is told."""


def budget(num_gpus: int, overrides: Sequence[str]) -> StepBudget:
    """The budget of a step on so many GPUs, 8 to a node."""
    return StepBudget(plan_pipeline(compose([EXPERIMENT, f"cluster.nodes={num_gpus // 8}", *overrides])))


def best(num_gpus: int, overrides: Sequence[str]) -> tuple[str, float, float]:
    """Overrides, share and code's share of the candidate that leaves the least to add and fits."""
    found = []
    for candidate in CANDIDATES:
        each = budget(num_gpus, [*overrides, *candidate])
        if room_bytes(each.pipeline.config, fullest(stage_memories(each.pipeline))) >= SPARE_BYTES:
            found.append((each.share, " ".join(candidate), each.code_share))
    share, told, code_share = min(found)
    return told, share, code_share


def main(overrides: Sequence[str]) -> int:
    """Print tables and figures; 1 if a bar is missed."""
    console = Console(width=120)
    budgets = {num_gpus: budget(num_gpus, overrides) for num_gpus in BARS}
    for each in budgets.values():
        console.print(budget_table(each))
    for num_gpus in BARS:
        told, share, code_share = best(num_gpus, overrides)
        print(f"{num_gpus:,} GPUs, best that fits: {share:.1%} (of the code {code_share:.1%}) with {told}")
    for num_gpus, each in budgets.items():
        print(f"{num_gpus:,} GPUs: of the code, without layout, policies and SMs: {each.code_share:.1%}")
    missed = False
    for num_gpus, each in budgets.items():
        bar = BARS[num_gpus]
        told = "no bar" if bar is None else f"bar {bar:.0%}{'' if each.share <= bar else ', MISSED'}"
        missed = missed or (bar is not None and each.share > bar)
        print(f"{num_gpus:,} GPUs: {each.share:.1%} of the model's FLOPs ({told})")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
