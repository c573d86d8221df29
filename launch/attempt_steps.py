"""The SLURM steps of an attempt, preflight and training: started, watched and, if they hang, ended."""

import contextlib
import math
import signal
import subprocess
import time
import types
from pathlib import Path

from launch import srun
from launch.attempts import Attempts
from launch.comment import JobComment
from launch.history import Attempt
from launch.output import log
from launch.requeueing import check_is_own
from launch.step_creation import until_created
from launch.step_log import StepLog
from launch.submission import Submission

STOP_SIGNAL = signal.SIGUSR1
"""The signal that asks ranks to save and stop."""
REPEAT_S = 10.0
"""Seconds after which the stop signal is sent to the ranks again: one that was still starting missed it."""
PREFLIGHT_S = 1200.0
"""Time limit of a preflight: it needs minutes, and a few more to find out which node is silent."""
STEP_END_S = 60.0
"""Longest time from a step's failure on one node to its end on all: torchrun's 30 s plus SLURM's. If SLURM's
own process was lost along with the ranks, srun would wait for it forever."""
POLL_S = 0.5


class StopRequest:
    """SIGUSR1 or SIGTERM from SLURM: its time limit, a preemption, or an operator asks the job to stop."""

    def __init__(self) -> None:
        """Handle both signals from now on."""
        self.signal: signal.Signals | None = None
        """The latest signal; None until one arrives."""
        self.received_at_s = 0.0
        """Arrival of the first signal, on the monotonic clock."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._receive)

    def pause(self, seconds: float) -> None:
        """Sleep before the next attempt; a request ends the pause."""
        log(f"next attempt in {seconds:g} s")
        deadline = time.monotonic() + seconds
        while self.signal is None and time.monotonic() < deadline:
            time.sleep(min(0.2, seconds))

    def _receive(self, number: int, _frame: types.FrameType | None) -> None:
        self.received_at_s = self.received_at_s if self.signal else time.monotonic()
        self.signal = signal.Signals(number)


class AttemptSteps:
    """Runs the steps of one attempt at a time; a stop request ends them early."""

    def __init__(
        self, submission: Submission, attempts: Attempts, stop: StopRequest, comment: JobComment
    ) -> None:
        self.submission = submission
        self.attempts = attempts
        self.stop = stop
        self.comment = comment

    def preflight(self, attempt: Attempt) -> tuple[dict[str, str], int]:
        """Check the nodes of an attempt.

        Returns:
            Node -> why it failed, and an exit status, which is not 0 if there is no report.

        Raises:
            SchedulerError, ValueError: the first node cannot tell where ranks meet.
        """
        self.comment.say(f"attempt {attempt.number}: nodes are checked")
        srun_log, folder = self.attempts.preflight_log(attempt), self.attempts.folder(attempt)
        status = until_created(lambda: self._preflight(attempt, srun_log, folder), srun_log, self._is_over)
        unfit = self.attempts.unfit(attempt)
        if unfit is None:
            log(f"preflight ended with status {status} and without a report, see {folder}/preflight*.log")
            return {}, status or 1
        log(f"preflight: {len(attempt.nodes) - len(unfit)} of {len(attempt.nodes)} nodes passed")
        return unfit, 0

    def _preflight(self, attempt: Attempt, srun_log: Path, folder: Path) -> int:
        rendezvous = self._find_rendezvous(attempt, srun_log)
        with srun_log.open("a", encoding="utf-8") as output:
            command = srun.preflight(self.submission, folder, attempt.nodes, rendezvous)
            step = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            return self._watch_preflight(step, attempt)

    def _is_over(self) -> bool:
        return self.stop.signal is not None

    def train(self, attempt: Attempt) -> int:
        """Run the ranks and return srun's exit status.

        Raises:
            SchedulerError, ValueError: the first node cannot tell where ranks meet.
        """
        self.comment.say(f"attempt {attempt.number} trains", with_progress=True)
        srun_log = self.attempts.srun_log(attempt)
        return until_created(lambda: self._train(attempt, srun_log), srun_log, self._is_over)

    def _train(self, attempt: Attempt, srun_log: Path) -> int:
        rendezvous = self._find_rendezvous(attempt, srun_log)
        with srun_log.open("a", encoding="utf-8") as output:
            command = srun.training(self.submission, attempt.number, attempt.nodes, rendezvous)
            step = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            return self._watch_training(step, StepLog(srun_log, self.submission.max_log_bytes))

    def _find_rendezvous(self, attempt: Attempt, srun_log: Path) -> tuple[str, str]:
        # SLURM would create the step in whatever runs under the job's number.
        check_is_own(attempt.job_id)
        return srun.find_rendezvous(self.submission, attempt.nodes[0], srun_log, self._is_over)

    def _watch_preflight(self, step: "subprocess.Popen[bytes]", attempt: Attempt) -> int:
        """srun's exit status; past its deadline, the step gets SIGTERM and `STEP_END_S` later SIGKILL."""
        ends_at_s = time.monotonic() + PREFLIGHT_S
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return step.wait(timeout=POLL_S)
            # The deadline moves up: the report already names nodes that hang, and a stop request is urgent.
            if self.attempts.has_report(attempt):
                ends_at_s = min(ends_at_s, time.monotonic() + STEP_END_S)
            if self.stop.signal is not None:
                ends_at_s = min(ends_at_s, self.stop.received_at_s)
            late_s = time.monotonic() - ends_at_s
            if late_s >= STEP_END_S:
                step.kill()
            elif late_s >= 0:
                step.terminate()

    def _watch_training(self, step: "subprocess.Popen[bytes]", step_log: StepLog) -> int:
        """srun's exit status; a stop request is passed on to the ranks, and a step that hangs is killed."""
        signaled_at_s = failed_at_s = -math.inf
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return step.wait(timeout=POLL_S)
            now_s = time.monotonic()
            # Stop requested: ask the ranks to save, and kill them if that takes too long.
            if self.stop.signal is not None and now_s - signaled_at_s >= REPEAT_S:
                log(f"{self.stop.signal.name}: ranks are asked to save and stop")
                self.comment.say(f"{self.stop.signal.name}: ranks save and stop", with_progress=True)
                signaled_at_s = now_s
                step.send_signal(STOP_SIGNAL)
            if self.stop.signal is not None and (
                now_s - self.stop.received_at_s >= self.submission.stop_within_s
            ):
                log("ranks did not stop in time and are killed; steps since the newest checkpoint are lost")
                step.kill()
            # Ranks failed on one node: the step must end on the others soon.
            if failed_at_s > 0 and now_s - failed_at_s >= STEP_END_S:
                log(f"srun is still waiting {STEP_END_S:g} s after ranks failed: it is killed")
                step.kill()
            elif step_log.look() is not None and failed_at_s < 0:
                failed_at_s = now_s
