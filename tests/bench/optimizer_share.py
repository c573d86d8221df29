"""What the optimizer takes of a training step, with AdamW and with MuonClip.

    python -m tests.bench.optimizer_share

Trains the smoke model on the smoke set on 4 ranks, in the layout of `experiment=smoke`, and times norm, clip,
update and gather, QK-Clip included, within each step. The share is of the fastest steps of both kinds, as
others of this machine only ever make one slower. The share at the real model's sizes, in FLOPs, is printed by
`tests.bench.muon_balance`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from k25_train.config.optimizer import OptimName
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import start_run

STEPS, WARM_UP_STEPS = 16, 4


def times(context: RankContext, arguments: Sequence[str]) -> list[tuple[float, float]]:
    """(seconds of the step, of the optimizer in it) after warm-up."""
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    step_of_optimizer, seconds = run.optimizer.step, [0.0]

    def timed() -> object:
        started = time.perf_counter()
        result = step_of_optimizer()
        seconds.append(time.perf_counter() - started)
        return result

    run.optimizer.step = timed
    with run.data:
        found = [(train_step(run, step).step_time_s, seconds[-1]) for step in range(1, STEPS + 1)]
    return found[WARM_UP_STEPS:]


def main() -> None:
    """Measure both and print them."""
    table = Table("optimizer", "share of the smoke step", title="norm, clip, update, gather")
    for name in OptimName:
        arguments = ["experiment=smoke", f"optim={name.value}", f"train.steps={STEPS}"]
        arguments += ["optim.warmup=1", "optim.decay=1"]
        by_rank = run_ranks(times, 4, arguments, timeout_s=900.0)
        shares = [min(optimizer for _, optimizer in rank) / min(step for step, _ in rank) for rank in by_rank]
        table.add_row(name.value, f"{max(shares):.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
