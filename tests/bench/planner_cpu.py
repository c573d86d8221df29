"""Step times that the planner says for layouts that it has not seen, next to those of real processes.

    python -m tests.bench.planner_cpu [--only NUMBER ...] [--steps N]

1. 4 ranks train a shrunk model of 8 layers in 3 layouts, on real batches of texts and images, and write
   their run folders. Ranks run in slow motion (tests/helpers/paced_ranks.py): code, processes, messages,
   engines and schedules are real, but passes and the vision tower last as long as their model FLOPs take at a
   rate that only the ranks know, so that they do not wait for the machine's few cores. What the optimizer,
   messages and the host's work between passes take is as it is.
2. `k25-plan calibrate` fits its constants to the folders of these 3 runs.
3. Another 6 layouts, of other sizes, micro-batches and ways of encoding images, train with the device file
   that this gave. The planner, by the functions that plan GPUs, says how long their steps take, at the shares
   of images that these had. It has to be right within 10%.

"Computing" is the part of the busiest rank's passes that was not sleep. Above a fifth, other work on the
machine has disturbed the run, and the bar says nothing. Ends non-zero where the bar is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from k25_train.compose.resolve import compose, load, to_yaml
from k25_train.plan.calibrate.calibrate import calibrate
from k25_train.plan.calibrate.device_file import device_file
from k25_train.plan.calibrate.measured import CONFIG_FILE, MeasuredRun, read_run
from k25_train.plan.calibrate.planned import planned_s
from k25_train.plan.report.calibration import calibration_lines, calibration_table
from k25_train.run_folder.rows_file import METRICS_FILE, as_line
from tests.helpers.paced_ranks import Clock, at_pace, slow_down
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run
from tests.helpers.smoke_mix import mix
from tests.helpers.tiny_shards import write_tiny_shard_set

NUM_RANKS = 4
BAR = 0.10
DISTURBED = 0.2
"""Share of computing above which ranks have waited for a core."""
PACE_TFLOPS = 0.001
"""Of the ranks; the planner is told another rate, that of `device=cpu`."""
WORK = (
    "model.num_layers=8 model.expert_ffn_hidden_size=256 model.dense_ffn_hidden_size=768 "
    "model.vision.num_layers=3 model.vision.hidden_size=48 model.vision.ffn_hidden_size=96 "
    "train.global_batch_size=8 train.micro_batch_size=1 optim=adamw optim.warmup=1 "
    "optim.decay=1 "
    # Pixels are where the tower is.
    "cluster.host_copy_gb_per_s=1000"
).split()
IMAGES, TEXT = mix(text=0.5, caption=0.4, ocr=0.1), ["dep.mode=coupled", *mix(text=1)]


@dataclass(frozen=True, slots=True)
class Layout:
    """One run."""

    name: str
    overrides: list[str]


CALIBRATED = (
    Layout("pp4, upfront", [*layout(pp=4), *IMAGES, "dep.schedule=upfront"]),
    Layout(
        "pp2 vpp2 ep2 dp2, 12, text",
        [*layout(pp=2, vpp=2, ep=2, dp=2), *TEXT, "train.global_batch_size=12"],
    ),
    Layout("dp4, 4, text", [*layout(dp=4), *TEXT, "train.global_batch_size=4"]),
)
UNSEEN = (
    Layout("pp4 vpp2, text", [*layout(pp=4, vpp=2), *TEXT]),
    Layout("pp2 dp2, coupled", [*layout(pp=2, dp=2), *IMAGES, "dep.mode=coupled"]),
    Layout("ep4 dp4, upfront", [*layout(ep=4, dp=4), *IMAGES, "dep.schedule=upfront"]),
    Layout("pp4 vpp2, bubbles", [*layout(pp=4, vpp=2), *IMAGES, "dep.schedule=bubbles"]),
    Layout("pp2 vpp3 ep2 dp2, text", [*layout(pp=2, vpp=3, ep=2, dp=2), *TEXT]),
    Layout(
        "pp2 vpp2 dp2, 16 in micro-batches of 2, upfront",
        [
            *layout(pp=2, vpp=2, dp=2),
            *IMAGES,
            "dep.schedule=upfront",
            "train.micro_batch_size=2",
            "train.global_batch_size=16",
        ],
    ),
)


def train(context: RankContext, arguments: Sequence[str]) -> float:
    """Train in slow motion; the first rank writes the run folder. Returns the share of computing."""
    from k25_train.training.rows import metrics_row
    from k25_train.training.step import train_step

    run, clock = start_run(context, arguments), Clock()
    slow_down(run, clock, at_pace(run.config, PACE_TFLOPS))
    clock.is_slow, lines = True, list[bytes]()
    with run.data:
        for step in range(1, run.config.train.steps + 1):
            row = metrics_row(run.config, step, train_step(run, step), is_mixed_anew=False)
            lines.append(as_line(row))
    if run.is_main:
        folder = Path(run.config.run.dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(to_yaml(run.config), encoding="utf-8")
        (folder / METRICS_FILE).write_bytes(b"".join(lines))
    return clock.computing_share


class Bench:
    """Runs in a folder."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.data = write_tiny_shard_set(folder / "shards")

    def measure(self, case: Layout, *more: str) -> tuple[Path, float]:
        """Train a layout; returns its run folder and the share of computing."""
        run = self.folder / case.name.replace(", ", "_").replace(" ", "_")
        common = [*WORK, f"train.steps={self.steps}", "train.trace_step=null"]
        arguments = overrides(self.data, run, *common, *case.overrides, *more)
        # What a layout may not be is told before processes are started.
        compose(arguments)
        return run, max(run_ranks(train, NUM_RANKS, arguments, timeout_s=900.0))


def main() -> int:
    """Measure, calibrate, predict; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", type=int, nargs="+", default=range(len(UNSEEN)), help="of the unseen layouts"
    )
    parser.add_argument("--steps", type=int, default=9, help="of each run, of which the first 3 do not count")
    options = parser.parse_args()
    console, computing = Console(width=130, highlight=False), list[float]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bench = Bench(folder, options.steps)
        # 1. Three runs, and what they say.
        runs = []
        for case in CALIBRATED:
            run, share = bench.measure(case)
            runs.append(run)
            computing.append(share)
        found = calibrate(runs, lambda path: load(path).config)
        device = folder / "this_machine.yaml"
        device.write_text(device_file(found), encoding="utf-8")
        console.print(calibration_table(found))
        console.print(*calibration_lines(found), sep="\n")
        # 2. Others, which are planned from their configuration alone.
        errors, table = (
            [],
            Table("layout not seen before", "images", "measured", "planned", "off by", "computing"),
        )
        for case in (UNSEEN[index] for index in options.only):
            run, share = bench.measure(case, f"device={device}")
            computing.append(share)
            measured = read_run(run, lambda path: load(path).config)
            errors.append(add_row(table, case.name, measured, share))
    console.print(table)
    if max(computing) > DISTURBED:
        console.print(
            f"DISTURBED: a rank computed {max(computing):.0%} of its passes, {DISTURBED:.0%} is quiet"
        )
    worst = max(errors, key=abs)
    console.print(
        f"worst of {len(errors)} layouts that were not calibrated on: {worst:+.1%} (bar: {BAR:.0%})"
    )
    return int(abs(worst) > BAR)


def add_row(table: Table, name: str, run: MeasuredRun, computing: float) -> float:
    """Compare a run with its plan; returns the worst error of its groups of steps."""
    errors = []
    for group, planned in zip(run.groups, planned_s(run, run.config.cluster.rates.calibration), strict=True):
        errors.append(planned / group.step_s - 1)
        table.add_row(
            name,
            f"{group.vision_share:.0%}",
            f"{group.step_s:.3f} s ± {group.noise:.1%}",
            f"{planned:.3f} s",
            f"{errors[-1]:+.1%}",
            f"{computing:.0%}" + (" DISTURBED" if computing > DISTURBED else ""),
        )
    return max(errors, key=abs)


if __name__ == "__main__":
    sys.exit(main())
