"""Where the time of a step of `k25_pretrain_4k` goes on 256, 2,048 and 4,096 GPUs, computed from the plan.

    python -m tests.bench.step_budget [SECTION.KEY=VALUE ...]

Prints a table for each size, the best of a few legal overrides that fit, and last how much longer a step
takes than its model FLOPs at 40% of the data sheet's rate, next to its bar. About that rate is published for
an architecture like ours, 386.6 TFLOP/s for Moonlight-16B-A3B on 16 H100 (Megatron-Bridge, July 2026).
Nothing is measured.
"""

import sys
from collections.abc import Sequence

from rich.console import Console

from k25_train.compose.resolve import compose
from k25_train.plan.memory.verdict import Fit, judge_memory
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.report.step_time import time_table
from k25_train.plan.time.plan_step import plan_step
from k25_train.plan.time.step_plan import StepPlan

EXPERIMENT = "experiment=k25_pretrain_4k"
RATE = 0.4
BARS = {256: 0.08, 2048: None, 4096: 0.15}
"""GPUs -> the most that everything but the model's FLOPs at that rate may take, over these."""
DEEPER = ("parallelism.pp=8", "parallelism.vpp=4", "parallelism.ep=32")
"""Half the stages, each with as many weights, since twice as many ranks share experts."""
CANDIDATES = tuple(
    (f"parallelism.dispatcher={kind}", *layout)
    for kind in ("hybridep", "alltoall")
    for layout in ((), DEEPER, ("parallelism.pp=8", "parallelism.vpp=2", "parallelism.ep=32"))
)
"""Overrides of which the best that fits is told."""


def planned(num_gpus: int, overrides: Sequence[str]) -> StepPlan:
    """The plan of a step on so many GPUs, 8 to a node."""
    return plan_step(plan_pipeline(compose([EXPERIMENT, f"cluster.nodes={num_gpus // 8}", *overrides])))


def share(step: StepPlan) -> float:
    """By how much the step is longer than its model FLOPs, over these."""
    return RATE / step.mfu - 1


def best(num_gpus: int, overrides: Sequence[str]) -> tuple[str, StepPlan]:
    """The candidate with the shortest step of those that fit."""
    found = []
    for candidate in CANDIDATES:
        step = planned(num_gpus, [*overrides, *candidate])
        if judge_memory(step.pipeline, seeks_remedy=False).fit is not Fit.does_not_fit:
            found.append((" ".join(candidate), step))
    return min(found, key=lambda each: each[1].step_s)


def main(overrides: Sequence[str]) -> int:
    """Print tables and figures; 1 if a bar is missed."""
    console = Console(width=120)
    steps = {num_gpus: planned(num_gpus, overrides) for num_gpus in BARS}
    for num_gpus, step in steps.items():
        console.print(f"{num_gpus:,} GPUs")
        console.print(time_table(step))
    for num_gpus in BARS:
        told, step = best(num_gpus, overrides)
        print(f"{num_gpus:,} GPUs, best that fits: {share(step):+.1%}, {step.tflops:.0f} TFLOP/s with {told}")
    missed = False
    for num_gpus, step in steps.items():
        bar = BARS[num_gpus]
        told = "no bar" if bar is None else f"bar {bar:.0%}{'' if share(step) <= bar else ', MISSED'}"
        missed = missed or (bar is not None and share(step) > bar)
        rate = f"{RATE * step.pipeline.config.cluster.rates.bf16_tflops:.0f} TFLOP/s"
        print(f"{num_gpus:,} GPUs: {share(step):+.1%} of the model's FLOPs at {rate} ({told})")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
