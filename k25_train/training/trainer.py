"""The training loop: resume, cadence of logs, evaluations and checkpoints, signals. No parallel logic."""

import signal

from k25_train.checkpoint import folders, state
from k25_train.errors import ConfigError, DataError, TrainingError
from k25_train.metrics.report import Report
from k25_train.training.evaluation import eval_losses
from k25_train.training.rows import metrics_row
from k25_train.training.run import Run, stall_watchdog
from k25_train.training.step import StepResult, train_step
from k25_train.training.stop import StopRequest
from k25_train.training.trace import traced
from parallel.activations.pool import HostBudgetError


class Trainer:
    """Trains a run from its newest checkpoint, or from the start, to its last step."""

    def __init__(self, run: Run, report: Report) -> None:
        self.run = run
        self.report = report
        self.stop = StopRequest()
        self.skipped_steps = 0
        """Consecutive steps, up to the latest one, whose gradient was not finite."""
        self.finished_step = 0
        """The latest step that was trained, here or before the run was resumed."""
        self.saved_step = 0
        """The latest step with a checkpoint."""

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
            except DataError as error:
                raise DataError(f"{error}\n{self.keep_progress()}") from error

    def keep_progress(self) -> str:
        """Save the last finished step before the run ends, if it is not saved yet; says where it is.

        Called by every rank, when what ends the run has been agreed on: all have finished the same step.
        """
        if self.finished_step > self.saved_step:
            self.save(self.finished_step)
        if not self.saved_step:
            return "No step was finished, so nothing is lost."
        return (
            f"Step {self.finished_step} is saved in {self.run.checkpoints}; start again when the data can be "
            "read, and the run goes on from there."
        )

    def _fit(self) -> None:
        run, cadence = self.run, self.run.config.train
        # 1. Where to start: after the newest checkpoint, or from the beginning with a first evaluation.
        start = self.finished_step = self.saved_step = self.resume()
        if start == cadence.steps:
            self.report.already_finished(start)
            return
        self.report.start(start)
        if start == 0:
            self.report.add({"step": 0, **self.evaluate()})
        # 2. Step after step. A step and its evaluation share a row.
        for step in range(start + 1, cadence.steps + 1):
            is_last = step == cadence.steps
            with traced(run, self.report, step), run.tracker.training(step):
                result = train_step(run, step)
                self.finished_step = step
                row = metrics_row(run.config, step, result)
            if is_last or step % cadence.eval_interval == 0:
                row |= self.evaluate()
            with run.tracker.phase("report"):
                self.report.add(row)
            self.count_skipped(step, result)
            # All ranks have to agree on stopping, or some would wait forever in the next step.
            stopping = self.stop.agreed(run.topology.device) and not is_last
            if is_last or stopping or step % run.config.checkpoint.interval == 0:
                self.save(step)
            if stopping:
                self.report.stopped(step, signal.Signals(self.stop.received).name)
                return
        # 3. Summary and plot.
        self.report.finish()

    def count_skipped(self, step: int, result: StepResult) -> None:
        """Report a step that changed nothing.

        Raises `TrainingError` after more of them in a row than `optim.max_skipped_steps`, with a checkpoint
        of the weights as they were before.
        """
        if not result.not_finite:
            self.skipped_steps = 0
            return
        # Name where it happened.
        self.skipped_steps += 1
        first, others = result.not_finite[0], len(result.not_finite) - 1
        where = f"{first} and {others} more" if others else first
        self.report.skipped(step, where)
        most = self.run.config.optim.max_skipped_steps
        if self.skipped_steps > most:
            # Weights are as before the first of them, so nothing is lost.
            self.save(step)
            raise TrainingError(
                f"step {step}: {self.skipped_steps} gradients in a row were not finite, "
                f"optim.max_skipped_steps={most} are allowed; the last one in {where}. No weight has changed "
                f"since, and {self.run.checkpoints}/step_{step} is saved: lower optim.lr, or look at the "
                "data of these steps, and start again"
            )

    def resume(self) -> int:
        """Load the newest checkpoint, if there is one, and return its step; 0 for a new run.

        Raises `ConfigError` if there is one that the configuration does not allow to resume from, and
        `CheckpointError` if it is incomplete or was trained with another configuration.
        """
        run, num_steps = self.run, self.run.config.train.steps
        # Nodes may see a shared folder differently for a moment: one rank looks on behalf of all.
        newest = state.on_first_rank(lambda: folders.start_from(run.checkpoints))
        if newest is None:
            return 0
        # Whether this configuration may resume from it.
        step = folders.step_of(newest)
        if not run.config.checkpoint.resume:
            raise ConfigError(
                f"checkpoint.resume=false, but an earlier run left {newest}: choose another run.dir, delete "
                f"{run.checkpoints}, or go on with checkpoint.resume=true"
            )
        if step > num_steps:
            raise ConfigError(
                f"train.steps={num_steps}, but the run has {newest}: raise train.steps, or choose another "
                "run.dir to start from the beginning"
            )
        if step == num_steps:
            return step
        # Weights, optimizer and step; data follow from the step.
        return state.load(newest, run.config, run.modules, run.optimizer)

    def evaluate(self) -> dict[str, float]:
        """Held-out losses, text apart from samples with media; a kind that the blend lacks has none."""
        with self.run.tracker.phase("evaluate"):
            return eval_losses(self.run, self.run.config.train.eval_sequences)

    def save(self, step: int) -> None:
        """Write a checkpoint and drop the oldest beyond `checkpoint.keep`."""
        run = self.run
        # How long this takes depends on the file system, not on a step.
        with run.tracker.phase("checkpoint", may_be_long=True):
            state.save(run.checkpoints, step, run.modules, run.optimizer, run.config)
            if run.is_main:
                folders.prune(run.checkpoints, run.config.checkpoint.keep)
        self.saved_step = step
