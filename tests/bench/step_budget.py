"""Where the time of a step of `k25_pretrain_4k` goes on 256, 2,048 and 4,096 GPUs, computed from the plan.

    python -m tests.bench.step_budget [SECTION.KEY=VALUE ...]

Prints a table for each size, what other choices would change, and last the share of everything that is not
the model's FLOPs, next to its bar. Nothing is measured: sources and assumptions are in
`k25_train/plan/time/budget*.py`.
"""

import sys
from collections.abc import Sequence

from rich.console import Console

from k25_train.compose.resolve import compose
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.report.time import budget_table
from k25_train.plan.time.budget import StepBudget

EXPERIMENT = "experiment=k25_pretrain_4k"
BARS = {256: 0.08, 2048: None, 4096: 0.15}
"""GPUs -> the most that everything but the model's FLOPs may take, over these."""
HYBRIDEP = "parallelism.dispatcher=hybridep"
CHOICES: dict[str, tuple[str, ...]] = {
    "NCCL's all-to-all": ("parallelism.dispatcher=alltoall", "parallelism.dispatcher_sms=null"),
    "HybridEP": (HYBRIDEP,),
    "and nothing recomputed or rounded (does not fit)": (HYBRIDEP, "activation=keep"),
    "and half the stages, twice the virtual ones (does not fit)": (
        HYBRIDEP, "parallelism.pp=8", "parallelism.vpp=4"
    ),
}  # fmt: skip
"""What could be chosen otherwise -> overrides."""


def budget(num_gpus: int, overrides: Sequence[str]) -> StepBudget:
    """The budget of a step on so many GPUs, 8 to a node."""
    return StepBudget(plan_pipeline(compose([EXPERIMENT, f"cluster.nodes={num_gpus // 8}", *overrides])))


def main(overrides: Sequence[str]) -> int:
    """Print tables and figures; 1 if a bar is missed."""
    console = Console(width=120)
    budgets = {num_gpus: budget(num_gpus, overrides) for num_gpus in BARS}
    for each in budgets.values():
        console.print(budget_table(each))
    print("Everything but the model's FLOPs, with other choices:")
    for name, choice in CHOICES.items():
        shares = (budget(num_gpus, [*overrides, *choice]).share for num_gpus in BARS)
        told = ", ".join(f"{gpus:,}: {share:.1%}" for gpus, share in zip(BARS, shares, strict=True))
        print(f"  {name}: {told}")
    missed = False
    for num_gpus, each in budgets.items():
        bar = BARS[num_gpus]
        told = "no bar" if bar is None else f"bar {bar:.0%}{'' if each.share <= bar else ', MISSED'}"
        missed = missed or (bar is not None and each.share > bar)
        print(f"{num_gpus:,} GPUs: {each.share:.1%} of the model's FLOPs ({told})")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
