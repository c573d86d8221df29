"""Supervises a run inside a SLURM job: one attempt after another until it finishes or is given up.

    python -m launch.supervisor RUN_FOLDER

It replaces the batch script's shell, so that it gets SLURM's signals. Every decision is printed (README.md).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from k25_train.entry import REFUSED, run_command
from k25_train.errors import K25Error
from k25_train.revision import code_version
from k25_train.run_folder import lock
from launch import scheduler, started_by
from launch.aftermath import Aftermath
from launch.attempt_steps import AttemptSteps, StopRequest
from launch.attempts import LATEST, Attempts
from launch.comment import JobComment
from launch.history import Attempt, Outcome
from launch.output import keep_limited, log
from launch.ownership import take_run
from launch.patience import LIMIT_S, Patience, UnwritableError
from launch.recurrence import suspects
from launch.requeueing import PATIENCE_S, Job, RequeuedError, ends_for_good
from launch.restart_policy import nodes_for, outcome_of, reason_to_give_up, wait_before_restart_s
from launch.room import RunFolderRoom
from launch.standby import Standby
from launch.submission import SCRIPT, SUPERVISOR_LOG, Submission
from launch.witnesses import forget_stall


class Supervisor:
    """The part of a run that one SLURM job carries out."""

    def __init__(
        self,
        submission: Submission,
        job_id: int,
        nodes: Sequence[str],
        partition: str,
        stop: StopRequest | None = None,
    ) -> None:
        """Handle SIGUSR1 and SIGTERM from now on, unless `stop` does; `nodes` are the job's, in SLURM's
        order."""
        self.submission = submission
        self.job = Job(submission, job_id, nodes, partition)
        self.unfit: set[str] = set()
        """Nodes that failed a preflight in this job."""
        self.stop = stop or StopRequest()
        self.room = RunFolderRoom(submission, lambda: self.stop.signal is not None, self.tell)
        self.attempts = Attempts(Path(submission.run), self.room.patience)
        self.comment = JobComment(job_id, submission.comment, self.room.step_now)
        self.aftermath = Aftermath(submission, self.attempts)
        self.standby = Standby(submission, job_id, nodes)
        self.steps = AttemptSteps(submission, self.attempts, self.stop, self.comment)

    def tell(self, text: str) -> None:
        """Say something about the run folder, which may not take the log, in the job's comment too."""
        log(text)
        self.comment.say(text)

    def run(self) -> int:
        """Make attempts until the run finishes, is requeued or is given up; returns the exit status.

        Raises `UnwritableError` if the run folder cannot be used for a day.
        """
        try:
            return self._run()
        except UnwritableError as error:
            if self.stop.signal is None:
                self.comment.say(f"ended: {error}")
                raise
            return self.requeue(f"{self.stop.signal.name} arrived while the run folder could not be used")
        finally:
            self.standby.end()
            self.comment.close()

    def _run(self) -> int:
        for vanished in self.attempts.close_vanished():
            log(f"attempt {vanished.number} of job {vanished.job_id} vanished: {vanished.reason}")
        attempt: Attempt | None = None
        while True:
            # 1. Is anything left to do, and does another attempt make sense?
            done = self.attempts.done(self.submission.num_steps)
            if done is not None:
                log(f"FINISHED: {done}")
                return 0
            history = self.history()
            avoidable = self.aftermath.avoidable(self.job.allocated, self.unfit)
            reason = reason_to_give_up(history, self.submission.max_restarts, avoidable)
            if reason is not None:
                return self.give_up(reason)
            # 2. Pause after a fault; nodes that failed preflight are replaced without one.
            if attempt is not None and attempt.outcome != Outcome.unfit:
                self.stop.pause(wait_before_restart_s(history, self.submission.restart_wait_s))
            self.room.wait()
            if self.stop.signal is not None:
                return self.requeue(f"{self.stop.signal.name} arrived between two attempts")
            # 3. On which nodes?
            if self.job.has_lost_supervisor():
                return self.requeue("the supervisor's node is no longer the job's")
            lost = self.job.unusable(self.job.allocated)
            excluded = {*lost, *self.unfit}
            nodes = nodes_for(self.job.allocated, excluded, suspects(history), self.submission.legal_nodes)
            if not nodes:
                return self.requeue_for_other_nodes(lost)
            left_out = self.aftermath.without(history, nodes, set(self.job.allocated) - excluded)
            # 4. Preflight and training.
            self.standby.keep(nodes)
            attempt = self.run_attempt(nodes, left_out)
            log(f"attempt {attempt.number} {attempt.outcome}: {attempt.reason}")
            self.comment.say(f"attempt {attempt.number} {attempt.outcome}: {attempt.reason}")
            if attempt.outcome == Outcome.finished:
                return 0
            if attempt.outcome == Outcome.stopped:
                return self.requeue(attempt.reason)

    def history(self) -> list[Attempt]:
        """The attempts of this job, across requeues; those of earlier jobs do not count, since whoever
        submitted the run again has looked at what happened before."""
        return [attempt for attempt in self.attempts.history() if attempt.job_id == self.job.id]

    def run_attempt(self, nodes: Sequence[str], left_out: dict[str, str]) -> Attempt:
        """Check these nodes, run the ranks once on them, and record how it ended and who was `left_out`."""
        history = self.history()
        attempt = self.attempts.start(self.job.id, nodes, code_version(Path(self.submission.checkout)))
        attempt = dataclasses.replace(attempt, left_out=left_out)
        self.attempts.write(attempt)
        forget_stall(self.attempts.run)
        if attempt.code != self.submission.code:
            log(f"the code is {attempt.code}; the run was submitted with {self.submission.code}")
        log(f"attempt {attempt.number} starts on {', '.join(nodes)}; logs in {self.attempts.folder(attempt)}")
        metrics_before = self.attempts.metrics_stamp()
        unfit, silent_start, is_refused = dict[str, str](), "", False
        # Preflight, then training.
        try:
            unfit, status = self.steps.preflight(attempt) if self.submission.preflight else ({}, 0)
            if not unfit and not status and self.stop.signal is None:
                status = self.steps.train(attempt)
        except (UnwritableError, RequeuedError):
            raise
        except (K25Error, OSError, ValueError) as error:
            log(f"attempt {attempt.number} could not start: {error}")
            # What this node refuses to the supervisor says nothing about the attempt's.
            status, is_refused = 1, isinstance(error, OSError)
            silent_start = "" if is_refused else nodes[0]
        # How did it end?
        progress, lost = self.attempts.progress(), self.job.unusable(nodes)
        has_trained = self.attempts.metrics_stamp() != metrics_before
        outcome = outcome_of(
            status,
            progress.last,
            self.submission.num_steps,
            asked_to_stop=self.stop.signal is not None,
            lost=lost,
        )
        ended = dataclasses.replace(
            attempt,
            outcome=Outcome.unfit if unfit else outcome,
            reached=progress.sound if has_trained else None,
            saved=self.attempts.saved_step(),
            skipped=progress.skipped if has_trained else 0,
            first_to_fail=None if unfit else self.attempts.first_to_fail(attempt),
            unfit=unfit,
        )
        # Was it the run folder, or else who? Keep that, and which nodes to avoid.
        ended = self.room.judged(ended, self.attempts)
        ended = self.aftermath.judged(ended, history, lost, silent_start)
        reason = self.aftermath.in_words(
            ended,
            status=status,
            last_step=progress.last,
            lost=lost,
            requested_by=self.stop.signal.name if self.stop.signal else "a signal to its ranks",
        )
        ended = dataclasses.replace(ended, reason=reason)
        self.unfit |= unfit.keys()
        is_failed = ended.outcome == Outcome.failed and not is_refused
        if is_failed and self.submission.preflight and not self.attempts.has_report(attempt):
            # The first node writes the report, so it is the likely culprit.
            self.unfit.add(attempt.nodes[0])
        self.attempts.write(ended)
        return ended

    def requeue_for_other_nodes(self, lost: dict[str, str]) -> int:
        """Requeue the job, unless the partition has too few nodes apart from those that failed preflight."""
        reason, obstacle = self.job.too_few_sound(lost, self.unfit), self.job.too_few_others(self.unfit)
        return self.requeue(reason) if obstacle is None else self.give_up(f"{reason}, and {obstacle}")

    def requeue(self, reason: str) -> int:
        """Put the job back into the queue, without the nodes that are not sound."""
        self.comment.say(f"goes back to the queue: {reason}")
        self.comment.close()
        return self.job.requeue(reason, self.to_exclude())

    def to_exclude(self) -> set[str]:
        """Nodes that the job must not get again: those that failed preflight, and those that were to blame
        twice, unless the partition is too small without them, or the run folder does not tell."""
        try:
            suspected = suspects(self.history()).keys() - self.unfit
        except UnwritableError:
            return self.unfit
        if not suspected or self.job.too_few_others(self.unfit | suspected) is not None:
            return self.unfit
        return self.unfit | suspected

    def give_up(self, reason: str) -> int:
        """Log why, and how to continue by hand; returns the exit status."""
        self.comment.say(f"given up: {reason}")
        history = self.history()
        folder = self.attempts.folder(history[-1]) if history else self.attempts.root / LATEST
        log(
            f"GIVEN UP: {reason}. The first errors are in {folder}/rank_<R>.log, node_<NODE>.log and "
            f"preflight.log; when their cause is fixed: sbatch {self.submission.run}/{SCRIPT}"
        )
        return 1


def main() -> None:
    """Supervise the run of the given folder in this SLURM job."""
    run_command(_run, output_goes_on=True)


def _run() -> int:
    folder, *token = started_by.arguments("RUN_FOLDER ...")
    return supervise(Path(folder), "".join(token[:1]), StopRequest())


def supervise(run: Path, token: str, stop: StopRequest) -> int:
    """Supervise a run in this SLURM job; `token`: the submission's, or empty. Its exit status."""
    job_id = started_by.number("SLURM_JOB_ID")
    patience = Patience(run, LIMIT_S, lambda: stop.signal is not None, log)
    try:
        nodes = scheduler.expand(started_by.variable("SLURM_JOB_NODELIST"))
        submission = patience.of(lambda: take_run(run, job_id, token, PATIENCE_S))
        keep_limited(run / SUPERVISOR_LOG, submission.max_log_bytes)
        partition = started_by.variable("SLURM_JOB_PARTITION")
        status = Supervisor(submission, job_id, nodes, partition, stop).run()
        if ends_for_good(job_id):
            patience.of(lambda: lock.release(run, job_id))
    except (K25Error, OSError, ValueError) as error:
        log(f"{type(error).__name__}: {error}")
        return REFUSED
    return status


if __name__ == "__main__":
    main()
