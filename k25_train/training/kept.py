"""Complete checkpoints of a run: proven ones, those that are set aside, and which of them go."""

from collections.abc import Callable

from k25_train.checkpoint import folders
from k25_train.checkpoint.background import Background
from k25_train.checkpoint.storage.kinds import Place
from k25_train.checkpoint.storage.places import storage_of
from k25_train.config.checkpoint import MAX_UNSOUND
from k25_train.metrics.report import Report
from k25_train.run_folder.checkpoints import note_steps
from k25_train.training.run import Run


class KeptCheckpoints:
    """Changes the folder of the checkpoints, on rank 0, one change after the other, while training goes on:
    to delete thousands of files takes a file system its time. On other ranks every method does nothing."""

    def __init__(self, run: Run, report: Report) -> None:
        self._run, self._report = run, report
        self._changes: list[Background[str]] = []
        """Those that were not told yet, in their order."""

    def note(self) -> None:
        """A checkpoint is complete: those who look after the run see that in its folder."""
        self._start(lambda: "")

    def prove(self, step: int) -> None:
        """A sound step was taken from the weights of a checkpoint: it stays, and older ones may go."""
        config = self._run.config.checkpoint

        def change() -> str:
            folders.mark_proven(self._root, step)
            folders.prune(self._root, config.keep, config.keep_every)
            return ""

        self._start(change)

    def set_aside(self, step: int, why: str) -> None:
        """The weights of a checkpoint turned out to be bad."""

        def change() -> str:
            place = folders.set_aside(self._root, step, why)
            folders.prune_unsound(self._root, MAX_UNSOUND)
            return f"step_{step} is set aside as {place}: {why}" if place else ""

        self._start(change)

    def prune_unsound(self, *, coming: int = 0) -> None:
        """Drop the oldest of those that were set aside, with room for so many that are `coming`."""

        def change() -> str:
            folders.prune_unsound(self._root, MAX_UNSOUND - coming)
            return ""

        self._start(change)

    def tell(self) -> None:
        """Report the changes that are done."""
        while self._changes and self._changes[0].is_done:
            if told := self._changes.pop(0).result():
                self._report.notice(told)

    def settle(self) -> None:
        """Wait until all changes are done, and report them."""
        with self._run.tracker.phase("checkpoint", may_be_long=True):
            for change in self._changes:
                change.result()
        self.tell()

    @property
    def _root(self) -> Place:
        return self._run.checkpoints

    def _start(self, change: Callable[[], str]) -> None:
        """Change the folder after the changes before; a failure is told, and costs space alone."""
        if not self._run.is_main:
            return
        earlier = self._changes[-1:]

        def run() -> str:
            for each in earlier:
                each.result()
            try:
                self._run.claim.check()
                told = change()
                self._note_steps()
            except Exception as error:
                # Whatever it is, rank 0 must not end by it while the others go on.
                return f"{self._root}: old checkpoints could not be tidied up ({error})"
            return told

        self._changes.append(Background("checkpoint-folder", run))

    def _note_steps(self) -> None:
        """Leave the names of checkpoints in an object store where those of others are."""
        if not storage_of(self._root).has_rename:
            sound = folders.sound_checkpoints(self._root)
            note_steps(self._run.folder, map(folders.step_of, sound))
