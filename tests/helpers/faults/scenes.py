"""What trials start from: a data set, uninterrupted runs by layout, and copies of them cut off at a step."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from k25_train.run_folder.rows_file import Row, read_rows
from tests.helpers.faults import clock
from tests.helpers.faults.small_jobs import JobSpec, SmallJob
from tests.helpers.interrupted_runs import without_times
from tests.helpers.runs import layout, overrides
from tests.helpers.tiny_shards import write_tiny_shard_set

NUM_STEPS = 4
KEEP = 2
LAYOUTS = {
    "alone": (1, layout()),
    "two replicas": (2, layout(dp=2, ep=2)),
    "two stages": (2, layout(pp=2)),
}
"""Name -> number of ranks, overrides."""
SAME_LAYOUT, OTHER_LAYOUT = 0.0, 1e-5
"""Largest relative difference from the uninterrupted run, of one layout and of another."""
TIMEOUT_S = 150.0
"""Seconds after which a job of some seconds hangs, on a machine that is busy otherwise."""


@dataclass(frozen=True, slots=True)
class Reference:
    """An uninterrupted run that kept every checkpoint."""

    folder: Path
    counts: dict[str, int]
    """How often rank 0 reached each moment."""

    @property
    def rows(self) -> list[Row]:
        """Its metrics, without times."""
        return without_times(read_rows(self.folder / "metrics.jsonl"))


class World:
    """A folder with the data set and the references; made once, then only read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"

    def reference(self, name: str) -> Reference:
        """The uninterrupted run in a layout; trained when it is first asked for."""
        run, counts = (
            self.folder / "references" / name / "run",
            self.folder / "references" / name / "counts.json",
        )
        if not counts.exists():
            self._train(name, run)
        return Reference(run, json.loads(counts.read_text()))

    def build(self, names: list[str]) -> None:
        """Make the data set and these references."""
        if not self.data.exists():
            write_tiny_shard_set(self.data)
        clock.preload(self.folder)
        for name in names:
            self.reference(name)

    def _train(self, name: str, run: Path) -> None:
        scratch = run.parent / "scratch"
        shutil.rmtree(run.parent, ignore_errors=True)
        num_ranks, _ = LAYOUTS[name]
        arguments = small_run(self.data, run, name, "checkpoint.keep=100")
        folders = [run.parent.parent] * num_ranks
        spec = JobSpec(arguments=arguments, num_ranks=num_ranks, scratch=scratch, run=run, folders=folders)
        with SmallJob(spec) as job:
            outcome = job.run(lambda _: None, TIMEOUT_S)
        if any(outcome.statuses):
            raise RuntimeError(f"the uninterrupted run failed:\n{outcome.output}")
        (run.parent / "counts.json").write_text(json.dumps(dict(outcome.counts)))


@dataclass(slots=True, kw_only=True)
class Scene:
    """Where one trial takes place: its run folder, its data, and how to start jobs on them."""

    world: World
    folder: Path
    layout: str
    started_at: int
    """Step at which the run was cut off before the trial; 0 for none."""
    num_jobs: int = 0

    @property
    def data(self) -> Path:
        """The data set; the world's, unless the trial has made a copy."""
        own = self.folder / "data"
        return own if own.exists() or self.has_own_data else self.world.data

    has_own_data: bool = False

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        """Its checkpoints."""
        return self.run / "checkpoints"

    @property
    def reference(self) -> Reference:
        """The run that this one should be equal to."""
        return self.world.reference(self.layout)

    def prepare(self) -> None:
        """Copy the reference as it was when it had just saved `started_at`."""
        self.folder.mkdir(parents=True)
        if not self.started_at:
            return
        source = self.reference.folder
        shutil.copytree(source, self.run, ignore=shutil.ignore_patterns("checkpoints", "loss.png"))
        for step in range(max(1, self.started_at - KEEP + 1), self.started_at + 1):
            shutil.copytree(source / f"checkpoints/step_{step}", self.checkpoints / f"step_{step}")
        lines = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
        (self.run / "metrics.jsonl").write_text("".join(lines[: self.started_at + 1]))

    def copy_data(self) -> Path:
        """Give the trial a data set of its own, at the place it will have; returns it."""
        shutil.copytree(self.world.data, self.folder / "data")
        self.has_own_data = True
        return self.data


def small_run(data: Path, run: Path, layout_name: str, *more: str) -> list[str]:
    """Overrides of a run of `NUM_STEPS` that saves after every step."""
    return overrides(
        data,
        run,
        f"train.steps={NUM_STEPS}",
        "train.eval_interval=2",
        "train.eval_sequences=2",
        "train.global_batch_size=2",
        "model.num_layers=3",
        "checkpoint.interval=1",
        f"checkpoint.keep={KEEP}",
        "optim.warmup=1",
        "optim.decay=1",
        *LAYOUTS[layout_name][1],
        *more,
    )
