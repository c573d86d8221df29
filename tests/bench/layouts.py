"""Layouts on this machine's CPU: speed against one process at equal work, bytes per step against the formula.

    python -m tests.bench.layouts

Every layout trains the same global batches, each rank on one thread. Ranks beyond the machine's cores share
them, so what is shown is what a layout costs (bubbles, exchanges, smaller products), not what it gains on a
cluster.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from k25_train.compose.resolve import compose
from k25_train.plan.pipeline import layout_of
from k25_train.plan.time.communication import communication
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, start_run
from tests.helpers.step_traffic import count
from tests.helpers.tiny_shards import write_tiny_shard_set

WORK = (
    "experiment=smoke model.vocab_size=320 train.global_batch_size=16 train.micro_batch_size=1 train.steps=8 "
    "train.eval_sequences=64 optim.warmup=1 optim.decay=1 data.max_skipped_samples=0"
).split()
WARM_UP_STEPS = 2
LAYOUTS: dict[str, dict[str, int]] = {
    "one process": {},
    "dp2": {"dp": 2},
    "ep2": {"ep": 2, "dp": 2},
    "pp2": {"pp": 2},
    "pp2 x vpp2": {"pp": 2, "vpp": 2},
    "dp4": {"dp": 4},
    "ep4": {"ep": 4, "dp": 4},
    "pp4": {"pp": 4},
    "pp2 x vpp2 x ep2": {"pp": 2, "vpp": 2, "ep": 2, "dp": 2},
}


def steps_per_s(context: RankContext, arguments: Sequence[str]) -> float:
    """The fastest step after warm-up: others of this machine only ever make one slower."""
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    with run.data:
        times = [train_step(run, step).step_time_s for step in range(1, run.config.train.steps + 1)]
    return 1 / min(times[WARM_UP_STEPS:])


def main() -> None:
    """Measure every layout and print two tables."""
    cores = len(os.sched_getaffinity(0))
    speeds = Table("layout", "ranks", "chunks", "steps/s, one process = 1", title=f"speed on {cores} cores")
    volumes = Table("layout", "kind", "MB a step, counted", "formula", "ratio", title="sent by all ranks")
    with tempfile.TemporaryDirectory() as folder:
        data, run = write_tiny_shard_set(Path(folder, "shards")), Path(folder, "run")
        alone = 0.0
        for name, sizes in LAYOUTS.items():
            arguments = [*WORK, f"data.dir={data}", f"run.dir={run}", *layout(**sizes)]
            config = compose(arguments)
            num_ranks = config.world_size
            speed = min(run_ranks(steps_per_s, num_ranks, arguments, timeout_s=600.0))
            alone = alone or speed
            speeds.add_row(name, str(num_ranks), layout_of(config).to_megatron(), f"{speed / alone:.2f}")
            sent = count(arguments, num_ranks).sent
            for kind, volume in communication(config).items():
                counted = sent[kind]
                figures = f"{counted / 1e6:.3f}", f"{volume.sent_bytes / 1e6:.3f}"
                volumes.add_row(name, kind, *figures, f"{counted / volume.sent_bytes:.3f}")
            volumes.add_section()
    Console().print(speeds)
    Console().print(volumes)


if __name__ == "__main__":
    main()
