"""Saves of a run, one at a time: what each holds, when it goes on, and how long training waited for it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from k25_train.checkpoint import folders
from k25_train.checkpoint.agreement import on_first_rank
from k25_train.checkpoint.data_state import DataState
from k25_train.checkpoint.destination import Destination, SharedPlace
from k25_train.checkpoint.manifest import Manifest
from k25_train.checkpoint.pieces import pieces
from k25_train.checkpoint.records import Committed, Contents, Figures
from k25_train.checkpoint.saving import Saving
from k25_train.checkpoint.snapshot import build_snapshot
from k25_train.compose.resolve import to_yaml
from k25_train.config.schema import Config
from k25_train.run_folder.rows_file import Value
from k25_train.training.run import Run
from k25_train.units import GB


class NoSaving:
    """No save is in progress."""

    step = 0
    is_busy = has_failed = is_local = False
    is_written = True

    def abandon(self) -> None:
        """Nothing is written."""


class Saver:
    """Writes checkpoints while training goes on. All ranks call all methods; properties are a rank's own."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._snapshot = build_snapshot(run.topology.device)
        run.optimizer.before_update = self._wait_to_update
        self._saving: Saving | NoSaving = NoSaving()
        self.shared = SharedPlace(run.checkpoints)
        """Where checkpoints go that any layout can load."""
        self._stall_s = 0.0
        """Seconds for which training has waited since they were last reported."""
        self._stall_of_save_s = 0.0
        """And since the save in progress was begun."""
        self._unreported = Figures()

    @property
    def step(self) -> int:
        """The step of the save in progress; 0 if there is none."""
        return self._saving.step

    @property
    def is_busy(self) -> bool:
        """Whether this rank still works on a save."""
        return self._saving.is_busy

    @property
    def has_failed(self) -> bool:
        """Whether this rank has failed in it."""
        return self._saving.has_failed

    @property
    def is_local(self) -> bool:
        """Whether the save in progress goes to the nodes' own disks."""
        return self._saving.is_local

    def begin(
        self,
        where: Destination,
        step: int,
        *,
        data: DataState,
        origin: Mapping[str, str],
        losses: Sequence[float],
        why_unsound: str,
    ) -> None:
        """Start to save the state after a step, when no other save is in progress.

        Args:
            where: `shared`, or this rank's node.
            step: that was trained last.
            data: how far the data were read; rank 0's counts, as for the others.
            origin: facts of the weights that the run began with.
            losses: of the last sound steps, which those of a resumed run are compared with.
            why_unsound: what was wrong with the last step; empty if nothing was. The same on every rank.

        Raises `CheckpointError`, on every rank, if any cannot write; earlier checkpoints stay untouched.
        """
        run = self.run
        assert not self.step, "one save at a time"
        self._stall_of_save_s = 0.0
        with self.waiting():

            def look() -> dict[str, str]:
                # Nothing is written to a folder that is another run's by now.
                run.claim.check()
                return {**origin, **run.data.facts()}

            # 1. What is said of the state, the same on every rank.
            facts = on_first_rank(look)
            manifest = Manifest(
                step=step,
                files={},
                why_unsound=why_unsound,
                facts=facts,
                losses=losses,
                layout=layout_of(run.config),
                num_updates=num_updates(run),
            )
            texts = {folders.CONFIG: to_yaml(run.config), folders.DATA_STATE: data.to_text()}
            # 2. Copies and writers start; a rank on which they do not has all of them give up.
            contents = Contents(manifest=manifest, texts=where.texts(texts))
            self._saving = where.start(
                contents,
                self._snapshot,
                lambda: pieces(run.modules, run.optimizer),
                run.config.checkpoint.writers,
            )

    def go_on(
        self, why_unsound: str = "", *, gives_up: bool = False, holds_back: bool = False
    ) -> tuple[Committed, str] | None:
        """Go on with the save in progress, when no rank is busy or one has failed; otherwise wait for that.

        Args:
            why_unsound: what was found to be wrong with the state since it was saved.
            gives_up: whether a rank has failed.
            holds_back: whether what is written gets its name when the save goes on again, not before.

        Returns the checkpoint and what it cost, if it is complete now.
        """
        saving = self._saving
        assert isinstance(saving, Saving), "there is no save in progress"
        with self.waiting():
            if not gives_up:
                saving.wait()
            on_first_rank(self.run.claim.check)
            was_written = saving.is_written
            # What fails has nothing left in progress: the next save may begin.
            self._saving = NoSaving()
            committed = saving.advance(why_unsound, gives_up=gives_up, holds_back=holds_back)
        if committed:
            return committed, self._cost(saving.figures)
        assert not was_written, "the second time a save goes on is the last"
        self._saving, self._unreported = saving, saving.figures
        return None

    def write_to_the_end(self) -> None:
        """Wait until all ranks have written; the checkpoint gets its name when the save goes on."""
        if not self._saving.is_written:
            self.go_on(holds_back=True)

    def abandon(self) -> None:
        """Write no more: this rank's process ends, whatever the others do."""
        self._saving.abandon()

    def take_figures(self) -> dict[str, Value]:
        """Metrics of saves since they were last taken: none where nothing waited and nothing was written."""
        found: dict[str, Value] = {}
        if self._stall_s:
            found["checkpoint_stall_s"] = self._stall_s
        if self._unreported.num_bytes:
            found["checkpoint_write_s"] = self._unreported.write_s
            found["checkpoint_bytes"] = self._unreported.num_bytes
        self._stall_s, self._unreported = 0.0, Figures()
        return found

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within: training waits."""
        started_s = time.perf_counter()
        try:
            # How long this takes depends on the file system, not on a step.
            with self.run.tracker.phase("checkpoint", may_be_long=True):
                yield
        finally:
            self._add_stall(time.perf_counter() - started_s)

    def _wait_to_update(self) -> None:
        started_s = time.perf_counter()
        if self._snapshot.wait_to_update():
            self._add_stall(time.perf_counter() - started_s)

    def _add_stall(self, seconds: float) -> None:
        self._stall_s += seconds
        self._stall_of_save_s += seconds

    def _cost(self, figures: Figures) -> str:
        size = figures.num_bytes / GB
        speed = size / max(figures.write_s, 1e-9)
        return (
            f"{size:,.4g} GB written in {figures.write_s:.3g} s ({speed:.3g} GB/s), "
            f"for which training waited {self._stall_of_save_s:.2g} s"
        )


def layout_of(config: Config) -> dict[str, int | str]:
    """What a manifest says of the ranks that wrote it."""
    return {
        "pp": config.parallelism.pp,
        "vpp": config.parallelism.vpp,
        "ep": config.parallelism.ep,
        "cp": config.parallelism.cp,
        "dp": config.dp,
        "world_size": config.world_size,
        "dep": config.dep.mode.value,
    }


def num_updates(run: Run) -> int:
    """Steps that this rank's optimizers count."""
    return max((part.num_updates for part in run.optimizer.chained_optimizers), default=0)
