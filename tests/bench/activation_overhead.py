"""What activation policies cost in time on the CPU: step time of each relative to `keep`.

    python -m tests.bench.activation_overhead [ROUNDS]     # prints a table

Trains the smoke model on 2 ranks, two pipeline stages of two chunks each, so that passes wait long enough to
be offloaded. Every round (3) runs all policies in turn, since machines are shared: the ratio is taken within
a round, from the median step after the first two; the table shows smallest, median and largest of the rounds.

On a CPU this is the upper limit of what may be expected: copies to the host, which a GPU makes concurrently
with what it computes, and FP8, which its kernels do in one pass over memory, take the cores that compute.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tests.helpers.activation_policies import FP8, OFFLOAD, RECOMPUTE
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, start_run

STEPS, SKIPPED = 10, 2
POLICIES: dict[str, Sequence[str]] = {
    "keep": (),
    "recompute (all that can be)": RECOMPUTE,
    "fp8 (all that may be)": FP8,
    "offload (all)": OFFLOAD,
    "k2": ("activation=k2",),
}


def step_times(context: RankContext, arguments: Sequence[str]) -> list[float]:
    """Seconds of each step but the first ones."""
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    with run.data:
        return [train_step(run, step).step_time_s for step in range(1, STEPS + 1)][SKIPPED:]


def median_step_s(policies: Sequence[str]) -> float:
    """Of a fresh run."""
    arguments = ["experiment=smoke", *layout(pp=2, vpp=2), *policies]
    return statistics.median(run_ranks(step_times, 2, arguments, timeout_s=600.0)[0])


def main() -> None:
    """Run the rounds and print."""
    num_rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    rounds = [{name: median_step_s(more) for name, more in POLICIES.items()} for _ in range(num_rounds)]
    table = Table("policy", "step against keep: smallest", "median", "largest")
    for name in POLICIES:
        ratios = [seconds[name] / seconds["keep"] for seconds in rounds]
        table.add_row(
            name, *(f"{each:.2f}" for each in (min(ratios), statistics.median(ratios), max(ratios)))
        )
    Console().print(table)


if __name__ == "__main__":
    main()
