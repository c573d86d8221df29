"""The training loop: resume, cadence of logs, evaluations and checkpoints, signals. No parallel logic."""

import signal

import torch

from k25_train.checkpoint.agreement import on_first_rank
from k25_train.checkpoint.folders import step_folder, step_of
from k25_train.errors import CheckpointError, DataError, TrainingError
from k25_train.metrics.report import Report
from k25_train.training.device_memory import out_of_memory
from k25_train.training.evaluation import eval_losses
from k25_train.training.hooks import NO_HOOKS, StepHooks
from k25_train.training.keeper import CheckpointKeeper
from k25_train.training.rows import MetricsRow, metrics_row
from k25_train.training.run import Run, stall_watchdog
from k25_train.training.soundness import Soundness, Verdict
from k25_train.training.step import StepResult, train_step
from k25_train.training.stop import FOLDER_LOST, StopRequest, most_of_any_rank
from k25_train.training.trace import traced
from parallel.activations.pool import HostBudgetError


class Trainer:
    """Trains a run from its newest checkpoint, or from the start, to its last step."""

    def __init__(self, run: Run, report: Report, hooks: StepHooks = NO_HOOKS) -> None:
        self.run = run
        self.report = report
        self.hooks = hooks
        self.stop = StopRequest()
        self.soundness = Soundness(run.config.model.vocab_size)
        self.keeper = CheckpointKeeper(run, report, self.soundness)
        self.skipped_steps = 0
        """Consecutive steps, up to the latest one, whose gradient was not finite."""
        self.skipped_in = ""
        """Where it was not finite in the last of them."""
        self.finished_step = 0
        """The latest step that was trained, here or before the run was resumed."""
        self.reported_step = 0
        """The latest step whose row, with its evaluation, is in the metrics."""
        self.is_disturbed = False
        """Whether something that followed the latest step may slow the next one down."""
        self.verdict = Verdict()
        """Whether it went well."""
        self.waited_to_stop = False
        """Whether the latest step was skipped after a request to stop."""

    def fit(self) -> None:
        """Train to `train.steps`, or to a checkpoint if a signal asks to stop.

        A step or an evaluation that makes no progress for `train.stall_timeout_s` ends the process.
        """
        with stall_watchdog(self.run):
            try:
                self._fit()
            except HostBudgetError as error:
                raise TrainingError(
                    f"{error}; then start again: the run goes on from its newest checkpoint"
                ) from error
            except torch.OutOfMemoryError as error:
                raise out_of_memory(error, self.run.memory.told(), self.run.config) from error
            except DataError as error:
                raise DataError(f"{error}\n{self.keep_progress()}") from error
            except TrainingError as error:
                # A step that fails on all ranks alike costs no checkpoint that was almost complete.
                if failed := self.end_of_save():
                    raise TrainingError(f"{error}\n{failed}") from error
                raise
            finally:
                # A run that ends in good order has nothing in progress. Otherwise no thread may write into a
                # folder that the next job has by then, or still run when the interpreter ends.
                self.keeper.saver.abandon()
                self.hooks.close()

    def keep_progress(self) -> str:
        """Save the last finished step before the run ends, if it is not saved yet; says where it is.

        Called by every rank, when what ends the run has been agreed on: all have finished the same step.
        """
        # Without its row, a step is done again: a run that goes on after it would never have the row.
        if failed := self.end_of_save():
            return failed
        if self.reported_step == self.finished_step > self.keeper.saved_step:
            try:
                self.keeper.save(self.finished_step, self.verdict)
            except CheckpointError as error:
                return f"Step {self.finished_step} could not be saved: {error}"
        newest = self.keeper.newest()
        if newest is None:
            return "No step was finished, so nothing is lost."
        return (
            f"Step {step_of(newest)} is saved in {newest.parent}; start again when the data can be read, and "
            "the run goes on from there."
        )

    def end_of_save(self) -> str:
        """Wait for the save in progress, if there is one; says what went wrong with it."""
        step = self.keeper.saver.step
        try:
            self.keeper.finish()
        except CheckpointError as error:
            return f"Step {step} could not be saved: {error}"
        return ""

    def _fit(self) -> None:
        run, cadence = self.run, self.run.config.train
        # 1. Where to start: after the newest checkpoint, or from the beginning with a first evaluation.
        start = self.finished_step = self.reported_step = self.keeper.resume()
        if start == cadence.steps:
            self.report.already_finished(start)
            return
        self.report.start(start)
        self.report.sources(run.sources)
        self.hooks.resumed(start)
        if start == 0:
            self.report.add({"step": 0, **self.evaluate(0)})
        # 2. Step after step. A step and its evaluation share a row.
        for step in range(start + 1, cadence.steps + 1):
            is_last = step == cadence.steps
            self.hooks.before(step)
            with traced(run, self.report, step), run.tracker.training(step):
                result = train_step(run, step)
                self.finished_step, self.verdict = step, self.soundness.judge(result)
                self.keeper.trained(result.loader_state)
                is_mixed_anew = step == self.keeper.data.mixtures[-1].from_step
                row = row_of(run, step, result, is_mixed_anew=is_mixed_anew)
            row |= self.hooks.after(step, result)
            alarms = self.report.alarms_of(row, is_disturbed=self.is_disturbed)
            evaluation = self.evaluate(step) if is_last or step % cadence.eval_interval == 0 else {}
            verdict = self.verdict = self.soundness.judge_evaluation(self.verdict, evaluation)
            # 3. What the step says of the state before and after it; a save goes on, another begins.
            self.count_skipped(step, result, verdict)
            stopping = self.save_or_stop(step, verdict, is_last=is_last, is_alarming=bool(alarms))
            self.is_disturbed = bool(evaluation or self.keeper.saver.step or self.keeper.saved_step == step)
            with run.tracker.phase("report"):
                self.report.add({**row, **alarms, **evaluation, **self.keeper.figures()})
            self.reported_step = step
            if is_off := self.run.memory.warning():
                self.report.notice(f"warning: step {step}: {is_off}")
            # 4. A checkpoint is complete after the row of its step: a run that goes on there never writes it.
            self.check_skipped(step, verdict)
            if is_last or stopping or not run.config.checkpoint.asynchronous:
                self.keeper.finish()
            if stopping:
                self.tell_stopped(step, verdict)
                return
        # 5. Summary and plot.
        self.report.finish()
        self.check_last()

    def check_last(self) -> None:
        """Raise `TrainingError` if the state after the last step was set aside: the run has no result."""
        last, newest = self.run.config.train.steps, self.keeper.newest()
        if newest != step_folder(self.keeper.root, last):
            raise TrainingError(
                f"step {last}, the last one, is not sound: its state is set aside in {self.keeper.root}. The "
                f"same command goes on from {newest or 'the beginning'}; if that ends here too, lower "
                "optim.lr or look at the data of the last steps"
            )

    def save_or_stop(self, step: int, verdict: Verdict, *, is_last: bool, is_alarming: bool) -> bool:
        """Go on with the save in progress, begin one that is due, and return whether the run stops here.

        `is_alarming`: whether it gave an alarm, as the rank that writes metrics knows.
        Raises `CheckpointError` if a save has failed, `LockedError` if the run folder is another's by now.
        """
        # 1. All ranks have to agree, or some would wait forever in the next step.
        keeper, saver = self.keeper, self.keeper.saver
        request, is_busy, has_failed, time_is_up, local_time_is_up, saves_alarm = most_of_any_rank(
            [
                self.stop.wanted(is_lost=self.run.claim.is_lost),
                saver.is_busy,
                saver.has_failed,
                keeper.cadence.time_is_up,
                keeper.local.time_is_up,
                is_alarming and self.run.config.metrics.alarms.checkpoint,
            ],
            self.run.topology.device,
        )
        if self.stop.take(request) == FOLDER_LOST:
            on_first_rank(self.run.claim.check)
            # It was hidden for a moment only.
            request = 0
        # 2. The save in progress, then the next.
        keeper.learn(verdict)
        keeper.go_on(is_busy=bool(is_busy), has_failed=bool(has_failed))
        stopping = request > 0 and not is_last and self.may_stop(verdict)
        is_due = keeper.cadence.is_due(step, verdict, time_is_up=bool(time_is_up))
        # A save in progress has about the same state: nobody waits for it to begin another.
        saves_alarm = saves_alarm and not verdict.was_skipped and not saver.step
        if (is_due or saves_alarm or is_last or stopping) and not self.has_skipped_too_many:
            keeper.begin(step, verdict, is_proven=is_last)
            if is_last or stopping or not self.run.config.checkpoint.asynchronous:
                saver.write_to_the_end()
        elif keeper.local.is_due(step, verdict, time_is_up=bool(local_time_is_up), is_free=not saver.step):
            keeper.begin_local(step)
        return stopping

    def count_skipped(self, step: int, result: StepResult, verdict: Verdict) -> None:
        """Report a step that changed nothing."""
        if not verdict.was_skipped:
            self.skipped_steps = 0
            return
        # Name where it happened.
        self.skipped_steps += 1
        first, others = next(iter(result.not_finite), "its norm"), len(result.not_finite) - 1
        self.skipped_in = f"{first} and {others} more" if others > 0 else first
        self.report.skipped(step, self.skipped_in)

    @property
    def has_skipped_too_many(self) -> bool:
        """Whether more steps in a row were skipped than `optim.max_skipped_steps`."""
        return self.skipped_steps > self.run.config.optim.max_skipped_steps

    def check_skipped(self, step: int, verdict: Verdict) -> None:
        """Raise `TrainingError` if too many steps were skipped, with the state set aside and the last sound
        checkpoint named."""
        if self.has_skipped_too_many:
            most = self.run.config.optim.max_skipped_steps
            raise TrainingError(
                f"step {step}: {self.skipped_steps} gradients in a row were not finite, "
                f"optim.max_skipped_steps={most} are allowed; the last one in {self.skipped_in}. "
                f"{self.keeper.give_up(step, verdict)}"
            )

    def may_stop(self, verdict: Verdict) -> bool:
        """Whether a request to stop is followed now: a skipped step leaves no sound state to go on from, and
        the next one probably does; only one is waited for."""
        waits = verdict.was_skipped and not self.waited_to_stop
        self.waited_to_stop = waits
        return not waits

    def tell_stopped(self, step: int, verdict: Verdict) -> None:
        """Report that a signal ended the run, and from where the same command goes on."""
        name = signal.Signals(self.stop.received).name
        if verdict.is_sound:
            self.report.stopped(step, name)
        else:
            newest = self.keeper.newest() or "no checkpoint"
            self.report.notice(f"{name}: step {step} is not sound; the same command goes on from {newest}")

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out losses, text apart from samples with media, and what the hooks evaluate after a step; a
        kind that the blend lacks has no loss.

        There are no losses at all where no source holds anything out.
        """
        if not any(source.num_heldout for source in self.run.sources):
            return self.hooks.evaluate(step)
        with self.run.tracker.phase("evaluate"):
            losses = eval_losses(self.run, self.run.config.train.eval_sequences)
        return {**losses, **self.hooks.evaluate(step)}


def row_of(run: Run, step: int, result: StepResult, *, is_mixed_anew: bool) -> MetricsRow:
    """The row of a step on the rank that writes it; nothing on others, which would idle the device for it."""
    return metrics_row(run.config, step, result, is_mixed_anew=is_mixed_anew) if run.is_main else {}
