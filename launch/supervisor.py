"""Runs a submitted run's attempts, one after the other, on the nodes of a SLURM job (see README.md).

    python -m launch.supervisor RUN_FOLDER

It takes the place of the batch script's shell, so SLURM's signals reach it. What it decides, it prints.
"""

import contextlib
import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path

from k25_train.errors import K25Error
from launch import lock, scheduler
from launch.attempts import Attempts
from launch.decide import (
    Attempt,
    Outcome,
    nodes_for,
    outcome_of,
    reason_to_give_up,
    suspects,
    wait_before_restart_s,
)
from launch.rendezvous import JOIN_S
from launch.submission import SCRIPT, Submission

PATIENCE_S = 600.0
"""How long a controller of SLURM may be away while the run goes on."""
REPEAT_S = 10.0
"""Seconds after which ranks are told once more to stop: one that was still starting did not hear it."""
TOLD_TO_RANKS = signal.SIGUSR1
STEP_END_S = 60.0
"""Longest that a step takes to end on all nodes when it has failed on one: torchrun's 30 s and SLURM's. Where
SLURM's own process was lost with the ranks, srun would wait for it for ever."""


class Supervisor:
    """One SLURM job's part in a run."""

    def __init__(self, submission: Submission, job_id: int, nodes: Sequence[str]) -> None:
        """Listen to SIGUSR1 and SIGTERM from now on."""
        self.submission = submission
        self.job_id = job_id
        self.allocated = list(nodes)
        self.attempts = Attempts(Path(submission.run))
        self.asked: signal.Signals | None = None
        self.asked_at_s = 0.0
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: types.FrameType | None) -> None:
        self.asked_at_s = self.asked_at_s if self.asked else time.monotonic()
        self.asked = signal.Signals(number)

    def run(self) -> int:
        """Attempts until the run is finished, goes back to the queue, or is given up; the exit status."""
        self.attempts.close_vanished()
        attempt: Attempt | None = None
        while True:
            history = self.history()
            reason = reason_to_give_up(history, self.submission.max_restarts)
            if reason is not None:
                return self.give_up(reason)
            if attempt is not None:
                self.wait(wait_before_restart_s(history, self.submission.restart_wait_s))
            if self.asked is not None:
                return self.requeue(f"{self.asked.name} came between two attempts")
            lost = self.unusable(self.allocated)
            nodes = nodes_for(self.allocated, lost, suspects(history), self.submission.legal_nodes)
            if not nodes:
                told = ", ".join(f"{node} {state}" for node, state in lost.items())
                sound = f"{len(self.allocated) - len(lost)} of {len(self.allocated)} nodes are sound ({told})"
                return self.requeue(f"{sound}, the run needs one of {self.submission.legal_nodes}")
            attempt = self.attempt(nodes)
            say(f"attempt {attempt.number} {attempt.outcome}: {attempt.reason}")
            if attempt.outcome == Outcome.finished:
                return 0
            if attempt.outcome == Outcome.stopped:
                return self.requeue(attempt.reason)

    def history(self) -> list[Attempt]:
        """The attempts of this job, requeues included. One that was submitted anew counts from the start, as
        somebody has looked at what happened before."""
        return [attempt for attempt in self.attempts.history() if attempt.job_id == self.job_id]

    def attempt(self, nodes: Sequence[str]) -> Attempt:
        """Run the ranks once on these nodes, and keep how that ended."""
        attempt = self.attempts.start(self.job_id, nodes, code_version(Path(self.submission.checkout)))
        if attempt.code != self.submission.code:
            say(f"the code is {attempt.code}; the run was submitted with {self.submission.code}")
        say(f"attempt {attempt.number} starts on {', '.join(nodes)}; logs in {self.attempts.folder(attempt)}")
        before = self.attempts.metrics_stamp()
        try:
            status = self.run_step(attempt)
        except (K25Error, ValueError) as error:
            say(f"attempt {attempt.number} could not start: {error}")
            status = 1
        last_step = self.attempts.last_step()
        lost = self.unusable(nodes)
        outcome = outcome_of(
            status, last_step, self.submission.num_steps, asked_to_stop=self.asked is not None, lost=lost
        )
        failed_first = scheduler.first_to_fail(self.attempts.srun_log(attempt).read_text())
        ended = dataclasses.replace(
            attempt,
            outcome=outcome,
            reached=None if self.attempts.metrics_stamp() == before else last_step,
            first_to_fail=failed_first,
            reason=self.reason(outcome, status, last_step, lost, failed_first),
        )
        self.attempts.write(ended)
        return ended

    def reason(
        self,
        outcome: Outcome,
        status: int,
        last_step: int | None,
        lost: dict[str, str],
        failed_first: str | None,
    ) -> str:
        """The outcome in words."""
        where = f"at step {last_step} of {self.submission.num_steps}"
        if outcome is Outcome.node_lost:
            return f"{where}, as {', '.join(f'{node} is {state}' for node, state in lost.items())}"
        if outcome is Outcome.stopped:
            return f"{where}, asked by {self.asked.name if self.asked else 'a signal to its ranks'}"
        if outcome is Outcome.failed:
            first = (
                f"first on {failed_first}, see node_{failed_first}.log" if failed_first else "see srun.log"
            )
            return f"{where}, srun ended with status {status}, {first}"
        return where

    def run_step(self, attempt: Attempt) -> int:
        """The ranks' exit status, as srun tells it.

        Raises `SchedulerError` or ValueError if the first node cannot say where ranks meet.
        """
        with self.attempts.srun_log(attempt).open("w") as log:
            meeting = self.find_rendezvous(attempt, log.fileno())
            command = [
                *self.srun(attempt.nodes),
                "--kill-on-bad-exit=1",
                *self.submission.container,
                self.submission.python,
                "-m",
                "launch.node",
                self.submission.run,
                str(attempt.number),
                str(len(attempt.nodes)),
                meeting["address"],
                meeting["port"],
            ]
            step = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            return self.watch(step, self.attempts.srun_log(attempt))

    def watch(self, step: "subprocess.Popen[bytes]", log: Path) -> int:
        """Wait until the ranks have ended, tell them to stop if SLURM asks for it; srun's exit status."""
        told_at = failed_at = -math.inf
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return step.wait(timeout=0.5)
            now = time.monotonic()
            if self.asked is not None and now - told_at >= REPEAT_S:
                say(f"{self.asked.name}: ranks are asked to save and stop")
                told_at = now
                step.send_signal(TOLD_TO_RANKS)
            if self.asked is not None and now - self.asked_at_s >= self.submission.stop_within_s:
                say("ranks did not stop in time and are ended; steps since the newest checkpoint are lost")
                step.kill()
            if failed_at > 0 and now - failed_at >= STEP_END_S:
                say(f"srun still waits {STEP_END_S:g} s after ranks failed: it is ended")
                step.kill()
            elif failed_at < 0 and scheduler.first_to_fail(log.read_text()) is not None:
                failed_at = now

    def find_rendezvous(self, attempt: Attempt, log: int) -> dict[str, str]:
        """Address and port, as the first node knows them."""
        interface = [] if self.submission.interface is None else [self.submission.interface]
        command = [
            *self.srun(attempt.nodes[:1]),
            *self.submission.container,
            self.submission.python,
            "-m",
            "launch.rendezvous",
            str(self.submission.rendezvous_port),
            *interface,
        ]
        try:
            printed = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                timeout=JOIN_S,
                check=True,
            )
        except subprocess.SubprocessError as error:
            raise scheduler.SchedulerError(
                f"{attempt.nodes[0]} did not say where ranks can meet ({error}), see "
                f"{self.attempts.srun_log(attempt)}"
            ) from error
        return scheduler.last_json(printed.stdout)

    def srun(self, nodes: Sequence[str]) -> list[str]:
        """srun with one task on each of these nodes, which has all of it."""
        return [
            "srun",
            f"--nodes={len(nodes)}",
            f"--ntasks={len(nodes)}",
            "--ntasks-per-node=1",
            f"--nodelist={','.join(nodes)}",
            # The step before may not be gone in SLURM's books, and a lost node ends the step, not the job.
            "--overlap",
            "--no-kill=off",
            "--cpu-bind=none",
            "--mem=0",
        ]

    def wait(self, seconds: float) -> None:
        """Pause before the next attempt, or until a signal comes."""
        say(f"next attempt in {seconds:g} s")
        deadline = time.monotonic() + seconds
        while self.asked is None and time.monotonic() < deadline:
            time.sleep(min(0.2, seconds))

    def requeue(self, reason: str) -> int:
        """Go back to the queue under the same id, unless the job was cancelled or SLURM sees to it itself."""
        state = scheduler.job_state(self.job_id, PATIENCE_S)
        if state != "RUNNING":
            say(f"{reason}; job {self.job_id} is {state}, so it is not put back into the queue by itself")
            return 1
        # Given a range, SLURM starts the job as soon as its least is free: only where nodes are lost is that
        # better than to wait for all.
        lost = self.unusable(self.allocated)
        legal, spares = self.submission.legal_nodes, self.submission.spare_nodes
        least, most = legal[0] if lost else legal[-1], legal[-1] + spares
        nodes = scheduler.node_range(least, most)
        say(f"{reason}; job {self.job_id} goes back to the queue, for {nodes} nodes")
        # SLURM ends a job that it requeues with all its processes, scontrol included, by SIGTERM first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        scheduler.requeue(self.job_id, least, most, PATIENCE_S)
        return 0

    def unusable(self, nodes: Sequence[str]) -> dict[str, str]:
        """Node -> state of those that SLURM finds unable to go on."""
        return scheduler.unusable(nodes, PATIENCE_S)

    def give_up(self, reason: str) -> int:
        """Say why, and what to do."""
        folder = self.attempts.folder(self.history()[-1])
        say(
            f"GIVEN UP: {reason}. The first errors stand in {folder}/rank_<R>.log and node_<NODE>.log; when "
            f"their cause is mended: sbatch {self.submission.run}/{SCRIPT}"
        )
        return 1


def say(text: str) -> None:
    """One line of supervisor.log."""
    print(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}", flush=True)


def code_version(checkout: Path) -> str:
    """Commit of the code and whether files differ from it; the reason where git cannot tell."""
    git = ["git", "-C", str(checkout)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"not a git checkout: {checkout}"
    return head.stdout.strip() + (", with local changes" if status.stdout.strip() else "")


def main() -> None:
    """Supervise the run of the folder in this SLURM job."""
    (folder,) = sys.argv[1:]
    run, job_id = Path(folder), int(os.environ["SLURM_JOB_ID"])
    try:
        lock.acquire(run, job_id, lambda job: scheduler.job_state(job, PATIENCE_S))
        nodes = scheduler.expand(os.environ["SLURM_JOB_NODELIST"])
        status = Supervisor(Submission.read(run), job_id, nodes).run()
        if scheduler.job_state(job_id, PATIENCE_S) == "RUNNING":
            lock.release(run, job_id)
    except (K25Error, OSError) as error:
        say(f"{type(error).__name__}: {error}")
        sys.exit(2)
    sys.exit(status)


if __name__ == "__main__":
    main()
