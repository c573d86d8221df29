"""Which states of a run are saved, which of them stay, and from which it resumes.

A checkpoint counts when its last step was sound, and is proven when the next sound step was taken from its
weights: only then older ones may go. One that was never proven and turns out to be ruined is set aside, so
the newest checkpoint that counts is always one to go on from.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from k25_train.checkpoint import folders, state
from k25_train.checkpoint.agreement import on_first_rank
from k25_train.checkpoint.checking import check_same_run, losses_before, notes_on
from k25_train.checkpoint.data_state import DataState, changes, mixture_of, read_data_state
from k25_train.checkpoint.initial import origin_of, start_from_weights
from k25_train.config.checkpoint import MAX_UNSOUND
from k25_train.errors import CheckpointError, ConfigError
from k25_train.metrics.report import Report
from k25_train.training.run import Run
from k25_train.training.soundness import Soundness, Verdict


class CheckpointKeeper:
    """Saves and loads the checkpoints of a run. Every rank calls every method."""

    def __init__(self, run: Run, report: Report, soundness: Soundness) -> None:
        self.run = run
        self.report = report
        self.soundness = soundness
        self._unproven: int | None = None
        """Step of the newest sound checkpoint, until a sound step was taken from its weights."""
        self.saved_step = 0
        """The latest step that was saved or set aside, by this job or an earlier one."""
        self.data = DataState({}, [mixture_of(run.config, 1)])
        """How far the data were read by the step that was trained last, and how they were mixed."""
        self._origin: Mapping[str, str] = {}
        """What the run's first weights were, for the manifests of its checkpoints."""
        self._is_postponed = False
        """Whether the last step at which to save was skipped."""

    @property
    def root(self) -> Path:
        """Where the run's checkpoints are."""
        return self.run.checkpoints

    def resume(self) -> int:
        """Load the newest sound checkpoint, if there is one, and return its step; 0 for a new run.

        Raises `ConfigError` if there is one that the configuration does not allow to resume from, and
        `CheckpointError` if it is damaged, was trained with another configuration or other data, or if all
        checkpoints are unsound.
        """
        run, num_steps = self.run, self.run.config.train.steps
        accept_unsound = run.config.checkpoint.accept_unsound
        # Nodes may see a shared folder differently for a moment: one rank looks on behalf of all.
        newest = on_first_rank(lambda: folders.start_from(self.root, accept_unsound=accept_unsound))
        if newest is None:
            self._start()
            return 0
        # Whether this configuration may resume from it.
        step = folders.step_of(newest)
        if not run.config.checkpoint.resume:
            raise ConfigError(
                f"checkpoint.resume=false, but an earlier run left {newest}: choose another run.dir, or go "
                "on with checkpoint.resume=true"
            )
        if step > num_steps:
            raise ConfigError(
                f"train.steps={num_steps}, but the run has {newest}: raise train.steps, or choose another "
                "run.dir to start from the beginning"
            )
        facts = on_first_rank(run.data.facts)
        self.saved_step = step
        if step == num_steps:
            on_first_rank(lambda: check_same_run(newest, run.config, facts))
            return step
        # Weights, optimizer and step, then the data from there on.
        state.load(newest, run.config, run.modules, run.optimizer, facts=facts)
        self._origin = on_first_rank(lambda: origin_of(newest))
        if run.config.checkpoint.has_initial_weights:
            self.report.notice(f"checkpoint.init_from is not read again: the run goes on from {newest}")
        for note in on_first_rank(lambda: notes_on(newest, facts)):
            self.report.notice(note)
        is_mixed_alike = self._go_on_with_data(newest, step)
        if is_mixed_alike:
            self.soundness.recall(on_first_rank(lambda: losses_before(newest, facts)))
        self._unproven = step
        return step

    def _start(self) -> None:
        """Take the weights that a new run starts from, if there are any."""
        run = self.run
        if run.config.checkpoint.has_initial_weights:
            started = start_from_weights(run.config, run.modules, run.optimizer)
            self._origin = started.facts
            for note in started.notes:
                self.report.notice(note)

    def _go_on_with_data(self, checkpoint: Path, step: int) -> bool:
        """Have the data go on behind a step; whether they are mixed as before, so that losses compare."""
        saved = on_first_rank(lambda: read_data_state(checkpoint))
        now = mixture_of(self.run.config, step + 1)
        if not saved.loader:
            self.report.notice(
                f"{checkpoint} has no {folders.DATA_STATE}: its {step} steps are planned again, from 1 on"
            )
        self.run.data.start_from(step, saved.loader)
        self.data = saved.with_mixture(now)
        changed = changes(saved.mixtures[-1], now)
        if changed:
            self.report.notice(f"from step {step + 1} on the data are mixed in another way:")
        for line in changed:
            self.report.notice(f"  {line}")
        return not changed

    def trained(self, loader_state: Mapping[str, Any]) -> None:
        """Take note of where the loader is after the step that was trained last."""
        self.data = DataState(loader_state, self.data.mixtures)

    def learn(self, verdict: Verdict) -> None:
        """Draw conclusions from a step for the checkpoint whose weights it started from."""
        if self._unproven is None or verdict.was_skipped:
            return
        step, self._unproven = self._unproven, None
        if verdict.weights_were_ruined:
            self._set_aside(step, f"the next step showed that its weights are bad: {verdict.why_unsound}")
        else:
            self._tidy(lambda: folders.mark_proven(self.root, step))
            self._prune()

    def is_due(self, step: int, verdict: Verdict) -> bool:
        """Whether to save now: at the interval, or after it if that step was skipped, since the same state
        would be saved as an unsound one."""
        every = self.run.config.checkpoint.interval_steps
        due = self._is_postponed or (every is not None and step % every == 0)
        self._is_postponed = due and verdict.was_skipped
        return due and not verdict.was_skipped

    def save(self, step: int, verdict: Verdict, *, is_proven: bool = False) -> Path:
        """Write a checkpoint, and drop the oldest beyond `checkpoint.keep` if the new one is proven good.

        Returns where it is: set aside if the step or the state is not sound.
        """
        run = self.run
        facts = on_first_rank(run.data.facts)
        # How long this takes depends on the file system, not on a step.
        with run.tracker.phase("checkpoint", may_be_long=True):
            # Nothing is written to a folder that is another run's by now.
            on_first_rank(run.claim.check)
            if not verdict.is_sound:
                self._tidy(lambda: folders.prune_unsound(self.root, MAX_UNSOUND - 1))
            saved = state.save(
                self.root,
                step,
                run.modules,
                run.optimizer,
                run.config,
                facts=facts | dict(self._origin),
                losses=self.soundness.losses,
                why_unsound=verdict.why_unsound,
                data=self.data,
            )
        self.saved_step = step
        if saved != folders.step_folder(self.root, step):
            why = on_first_rank(lambda: folders.why_unsound(saved))
            self.report.notice(f"step {step} is not sound: {why}; set aside as {saved}")
            self._tidy(lambda: folders.prune_unsound(self.root, MAX_UNSOUND))
        elif is_proven:
            self._tidy(lambda: folders.mark_proven(self.root, step))
            self._prune()
        else:
            self._unproven = step
        return saved

    def give_up(self, step: int, verdict: Verdict) -> str:
        """Set the state aside, and say what to do; the run ends, with skipped steps alone since an update.

        The checkpoint with these very weights, if there is one that was never proven, is set aside too.
        """
        if self._unproven is not None:
            self._set_aside(self._unproven, "no step from its weights had a finite gradient")
        try:
            saved = self.save(step, verdict)
            aside = f"Its state is set aside as {saved}"
        except CheckpointError as error:
            aside = f"Its state could not be set aside: {error}"
        sound = on_first_rank(lambda: folders.sound_checkpoints(self.root))
        lower = "lower optim.lr, or look at the data of these steps, and start again: the run goes on from"
        if not sound:
            return (
                f"{aside}. There is no sound checkpoint: correct optim.lr or the data of these steps, and "
                "start in another run.dir, or go on from this state with checkpoint.accept_unsound=true"
            )
        earlier = f"; if that fails too, move it away to go on from {sound[-2]}" if len(sound) > 1 else ""
        return f"{aside}. The last sound checkpoint is {sound[-1]}: {lower} there{earlier}"

    def newest(self) -> Path | None:
        """The checkpoint that the run would resume from."""
        return on_first_rank(lambda: folders.newest_checkpoint(self.root))

    def _set_aside(self, step: int, why: str) -> None:
        self._unproven = None
        place: list[Path | None] = []
        self._tidy(lambda: place.append(folders.set_aside(self.root, step, why)))
        if place and place[0]:
            self.report.notice(f"step_{step} is set aside as {place[0]}: {why}")
        self._tidy(lambda: folders.prune_unsound(self.root, MAX_UNSOUND))

    def _prune(self) -> None:
        self._tidy(lambda: folders.prune(self.root, self.run.config.checkpoint.keep))

    def _tidy(self, action: Callable[[], object]) -> None:
        """Change the folder on rank 0; a failure is told, and costs space alone."""
        with self.run.tracker.phase("checkpoint", may_be_long=True):
            on_first_rank(self.run.claim.check)
            try:
                on_first_rank(action)
            except (OSError, CheckpointError) as error:
                self.report.notice(f"{self.root}: old checkpoints could not be tidied up ({error})")
