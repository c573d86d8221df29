"""Which states of a run are saved, and which of them stay.

A checkpoint counts when its last step was sound, and is proven when the next sound step was taken from its
weights: only then older ones may go. One that was never proven and turns out to be ruined is set aside, so
the newest checkpoint that counts is always one to go on from. What the next step says mostly comes while the
checkpoint is still being written, and is kept until it is complete.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from k25_train.checkpoint import folders
from k25_train.checkpoint.agreement import on_first_rank
from k25_train.checkpoint.data_state import DataState
from k25_train.checkpoint.records import Committed
from k25_train.checkpoint.storage.kinds import Place
from k25_train.errors import CheckpointError
from k25_train.metrics.report import Report
from k25_train.run_folder.rows_file import Value
from k25_train.training.cadence import SaveCadence
from k25_train.training.kept import KeptCheckpoints
from k25_train.training.local_checkpoints import build_local_checkpoints
from k25_train.training.resuming import data_of_a_new_run, resume
from k25_train.training.run import Run
from k25_train.training.saver import Saver
from k25_train.training.soundness import Soundness, Verdict


@dataclass(slots=True)
class _Pending:
    """What is known of the weights of the save in progress."""

    is_awaited: bool
    """Whether the next step that is taken from them is still to say whether they are good."""
    is_proven: bool = False
    """Whether they are."""
    why_ruined: str = ""
    """Why they are not."""


class CheckpointKeeper:
    """Saves and loads the checkpoints of a run. Every rank calls every method."""

    def __init__(self, run: Run, report: Report, soundness: Soundness) -> None:
        self.run = run
        self.report = report
        self.soundness = soundness
        self._unproven = 0
        """Step of the newest sound checkpoint, until a sound step was taken from its weights; then 0."""
        self.saved_step = 0
        """The latest step that was saved or set aside, by this job or an earlier one."""
        self.data = data_of_a_new_run(run)
        """How far the data were read by the step that was trained last, and how they were mixed."""
        self._origin: Mapping[str, str] = {}
        """What the run's first weights were, for the manifests of its checkpoints."""
        self.saver = Saver(run)
        self.local = build_local_checkpoints(run, report)
        self._kept = KeptCheckpoints(run, report)
        self.cadence = SaveCadence(run.config.checkpoint, has_clock=run.is_main)
        self._pending = _Pending(is_awaited=False)

    @property
    def root(self) -> Place:
        """Where the run's checkpoints are."""
        return self.run.checkpoints

    def resume(self) -> int:
        """Load the newest sound checkpoint, if there is one, and return its step; 0 for a new run.

        Raises as `resuming.resume` does.
        """
        start = resume(self.run, self.report, self.local)
        self.data, self._origin = start.data, start.origin
        self.soundness.recall(start.losses)
        if start.is_shared:
            self.saved_step = self._unproven = start.step
        return start.step

    def figures(self) -> dict[str, Value]:
        """Metrics of saves since they were last asked for."""
        return self.saver.take_figures()

    def trained(self, loader_state: Mapping[str, Any]) -> None:
        """Take note of where the loader is after the step that was trained last."""
        self.data = DataState(loader_state, self.data.mixtures)

    def learn(self, verdict: Verdict) -> None:
        """Draw conclusions from a step for the checkpoint whose weights it started from."""
        if verdict.was_skipped:
            return
        self.local.learn(verdict)
        # The newest state that was saved comes first: it is what this step began with.
        ruined = f"the next step showed that its weights are bad: {verdict.why_unsound}"
        if self._pending.is_awaited:
            why = ruined if verdict.weights_were_ruined else ""
            self._pending = _Pending(is_awaited=False, is_proven=not why, why_ruined=why)
        elif self._unproven:
            step, self._unproven = self._unproven, 0
            if verdict.weights_were_ruined:
                self._kept.set_aside(step, ruined)
            else:
                self._kept.prove(step)

    def go_on(self, *, is_busy: bool, has_failed: bool) -> None:
        """Go on with the save in progress, if there is one, unless some rank is busy with it.

        Called after each step, with what all ranks have agreed on. Raises `CheckpointError`, on every rank,
        if one has failed.
        """
        self._kept.tell()
        if self.saver.step and (has_failed or not is_busy):
            self._advance(gives_up=has_failed)

    def begin(self, step: int, verdict: Verdict, *, is_proven: bool = False) -> None:
        """Start to save the state after a step. An earlier save has to be complete: it is waited for.

        Args:
            step: that was trained last.
            verdict: on it.
            is_proven: whether no step will follow that could prove its weights.

        Raises `CheckpointError`, on every rank, if any cannot write.
        """
        # 1. One at a time. One on the nodes' disks is short, and of use until this one is complete.
        if self.saver.is_local:
            self.finish()
        if earlier := self.saver.step:
            self.report.notice(
                f"step {step} is to be saved, but the checkpoint of step {earlier} is not written yet: "
                "waiting for it. Raise checkpoint.interval, or checkpoint.writers where storage can do more"
            )
            self.finish()
        # 2. Room for it, before it needs any.
        if not verdict.is_sound:
            self._kept.prune_unsound(coming=1)
        with self.saver.waiting():
            self._kept.settle()
        # 3. What is said of its weights from now on is kept for the time when it is complete.
        self._pending = _Pending(is_awaited=verdict.is_sound and not is_proven, is_proven=is_proven)
        self.cadence.restart()
        self.local.shared_is_begun()
        self.saver.begin(
            self.saver.shared,
            step,
            data=self.data,
            origin=self._origin,
            losses=self.soundness.losses,
            why_unsound=verdict.why_unsound,
        )
        self.saved_step = step

    def begin_local(self, step: int) -> None:
        """Start to save the state after a sound step to the nodes' own disks, when no save is in progress."""
        with self._tolerating(step):
            self.saver.begin(
                self.local.place(self.newest()),
                step,
                data=self.data,
                origin=self._origin,
                losses=self.soundness.losses,
                why_unsound="",
            )

    @contextmanager
    def _tolerating(self, step: int) -> Iterator[None]:
        """Within: a disk that fails on all ranks alike costs the run nothing but that save."""
        try:
            yield
        except (CheckpointError, OSError) as error:
            self.report.notice(f"step {step} is not kept on the nodes' disks, and the run goes on: {error}")

    def finish(self) -> Place | None:
        """Wait until the save in progress is complete; returns where it is, or None if there was none."""
        place = None
        while self.saver.step:
            place = self._advance()
        self._kept.settle()
        return place

    def save(self, step: int, verdict: Verdict, *, is_proven: bool = False) -> Place:
        """Save, and wait until the checkpoint is complete; returns where it is."""
        self.begin(step, verdict, is_proven=is_proven)
        place = self.finish()
        assert place, "a save was begun"
        return place

    def _advance(self, *, gives_up: bool = False) -> Place | None:
        step = self.saver.step
        if self.saver.is_local:
            with self._tolerating(step):
                if local := self.saver.go_on(self.local.why_ruined, gives_up=gives_up):
                    self.local.committed(step, local[0])
            return None
        done = self.saver.go_on(self._pending.why_ruined, gives_up=gives_up)
        if not done:
            return None
        committed, cost = done
        self.report.notice(f"step {step} is saved: {cost}")
        self._kept.note()
        self._judge(step, committed)
        return committed.folder

    def _judge(self, step: int, committed: Committed) -> None:
        """What becomes of a checkpoint, and of others, once it is complete."""
        pending, self._pending = self._pending, _Pending(is_awaited=False)
        if committed.why_unsound:
            self.report.notice(
                f"step {step} is not sound: {committed.why_unsound}; set aside as {committed.folder}"
            )
            self._kept.prune_unsound()
        elif pending.why_ruined:
            self._kept.set_aside(step, pending.why_ruined)
        elif pending.is_proven:
            self._kept.prove(step)
        elif pending.is_awaited:
            self._unproven = step

    def give_up(self, step: int, verdict: Verdict) -> str:
        """Set the state aside, and say what to do; the run ends, with skipped steps alone since an update.

        The checkpoint with these very weights, if there is one that was never proven, is set aside too.
        """
        # 1. The save in progress has these very weights, or the newest checkpoint has.
        why = "no step from its weights had a finite gradient"
        try:
            if self._pending.is_awaited:
                self._pending = _Pending(is_awaited=False, why_ruined=why)
            self.finish()
            if self._unproven:
                self._kept.set_aside(self._unproven, why)
                self._unproven = 0
            # They hold these very weights, or lead to them.
            self.local.forget()
            saved = self.save(step, verdict)
            aside = f"Its state is set aside as {saved}"
        except CheckpointError as error:
            aside = f"Its state could not be set aside: {error}"
        # 2. What is left to go on from.
        sound = on_first_rank(lambda: folders.sound_checkpoints(self.root))
        lower = "lower optim.lr, or look at the data of these steps, and start again: the run goes on from"
        if not sound:
            return (
                f"{aside}. There is no sound checkpoint: correct optim.lr or the data of these steps, and "
                "start in another run.dir, or go on from this state with checkpoint.accept_unsound=true"
            )
        earlier = f"; if that fails too, move it away to go on from {sound[-2]}" if len(sound) > 1 else ""
        return f"{aside}. The last sound checkpoint is {sound[-1]}: {lower} there{earlier}"

    def newest(self) -> Place | None:
        """The checkpoint that the run would resume from."""
        return on_first_rank(lambda: folders.newest_checkpoint(self.root))
