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
from launch import lock, scheduler, srun
from launch.attempts import Attempts
from launch.restart_policy import (
    Attempt,
    Outcome,
    nodes_for,
    outcome_of,
    reason_to_give_up,
    suspects,
    wait_before_restart_s,
)
from launch.submission import SCRIPT, Submission

PATIENCE_S = 3600.0
"""How long a controller of SLURM may be away while the run goes on."""
REPEAT_S = 10.0
"""Seconds after which ranks are told once more to stop: one that was still starting did not hear it."""
PREFLIGHT_S = 1200.0
"""Longest that a preflight may take: it needs minutes, and some more to find out who is silent."""
TOLD_TO_RANKS = signal.SIGUSR1
STEP_END_S = 60.0
"""Longest that a step takes to end on all nodes when it has failed on one: torchrun's 30 s and SLURM's. Where
SLURM's own process was lost with the ranks, srun would wait for it for ever."""


class Supervisor:
    """One SLURM job's part in a run."""

    def __init__(self, submission: Submission, job_id: int, nodes: Sequence[str], partition: str) -> None:
        """Listen to SIGUSR1 and SIGTERM from now on."""
        self.submission = submission
        self.job_id = job_id
        self.allocated = list(nodes)
        self.partition = partition
        self.unfit: set[str] = set()
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
            if attempt is not None and attempt.outcome != Outcome.unfit:
                self.wait(wait_before_restart_s(history, self.submission.restart_wait_s))
            if self.asked is not None:
                return self.requeue(f"{self.asked.name} came between two attempts")
            lost = self.unusable(self.allocated)
            out = {*lost, *self.unfit}
            nodes = nodes_for(self.allocated, out, suspects(history), self.submission.legal_nodes)
            if not nodes:
                return self.look_elsewhere(lost)
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
        unfit: dict[str, str] = {}
        try:
            unfit, status = self.preflight(attempt) if self.submission.preflight else ({}, 0)
            if not unfit and not status and self.asked is None:
                status = self.train(attempt)
        except (K25Error, ValueError) as error:
            say(f"attempt {attempt.number} could not start: {error}")
            status = 1
        last_step = self.attempts.last_step()
        lost = self.unusable(nodes)
        outcome = outcome_of(
            status, last_step, self.submission.num_steps, asked_to_stop=self.asked is not None, lost=lost
        )
        ended = dataclasses.replace(
            attempt,
            outcome=Outcome.unfit if unfit else outcome,
            reached=None if self.attempts.metrics_stamp() == before else last_step,
            first_to_fail=None if unfit else self.first_to_fail(attempt),
            unfit=unfit,
        )
        ended = dataclasses.replace(ended, reason=self.reason(ended, status, last_step, lost))
        self.unfit |= unfit.keys()
        if outcome is Outcome.failed and self.submission.preflight and not self.attempts.has_report(attempt):
            # The first node writes the report, so the fault is likely its own.
            self.unfit.add(attempt.nodes[0])
        self.attempts.write(ended)
        return ended

    def first_to_fail(self, attempt: Attempt) -> str | None:
        """The node on which a process of the attempt ended first with an error."""
        logs = (self.attempts.srun_log(attempt), self.attempts.preflight_log(attempt))
        named = (scheduler.first_to_fail(read(log)) for log in logs if log.exists())
        return next((node for node in named if node is not None), None)

    def reason(self, ended: Attempt, status: int, last_step: int | None, lost: dict[str, str]) -> str:
        """The outcome in words."""
        where = f"at step {last_step} of {self.submission.num_steps}"
        if ended.outcome == Outcome.unfit:
            return "preflight failed on " + ", ".join(f"{node} ({why})" for node, why in ended.unfit.items())
        if ended.outcome == Outcome.node_lost:
            return f"{where}, as {', '.join(f'{node} is {state}' for node, state in lost.items())}"
        if ended.outcome == Outcome.stopped:
            return f"{where}, asked by {self.asked.name if self.asked else 'a signal to its ranks'}"
        if ended.outcome == Outcome.failed:
            node, logs = ended.first_to_fail, "srun.log"
            if self.submission.preflight and not self.attempts.has_report(ended):
                logs = "preflight.log and preflight_srun.log"
            elif node is not None:
                logs = f"node_{node}.log"
            first = f"see {logs}" if node is None else f"first on {node}, see {logs}"
            return f"{where}, srun ended with status {status}, {first}"
        return where

    def find_rendezvous(self, attempt: Attempt, log: Path) -> tuple[str, str]:
        """Where the ranks of an attempt can meet. Raises as that of `steps`."""
        return srun.find_rendezvous(
            self.submission, attempt.nodes[0], log, is_over=lambda: self.asked is not None
        )

    def preflight(self, attempt: Attempt) -> tuple[dict[str, str], int]:
        """Check the nodes of an attempt: node -> why it failed, and srun's exit status if there is no report.

        Raises `SchedulerError` or ValueError if the first node cannot say where ranks meet.
        """
        log = self.attempts.preflight_log(attempt)
        meeting = self.find_rendezvous(attempt, log)
        folder = self.attempts.folder(attempt)
        with log.open("a") as output:
            command = srun.preflight(self.submission, folder, attempt.nodes, meeting)
            step = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            status = self.wait_for_preflight(step, attempt)
        unfit = self.attempts.unfit(attempt)
        if unfit is None:
            say(f"preflight ended with status {status} and without a report, see {folder}/preflight*.log")
            return {}, status or 1
        say(f"preflight: {len(attempt.nodes) - len(unfit)} of {len(attempt.nodes)} nodes passed")
        return unfit, 0

    def wait_for_preflight(self, step: "subprocess.Popen[bytes]", attempt: Attempt) -> int:
        """srun's exit status; a preflight is ended where SLURM asks the job to stop, or its time is over.

        That is so, too, some time after its report: who hangs then is named there.
        """
        ends_at_s = time.monotonic() + PREFLIGHT_S
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return step.wait(timeout=0.5)
            if self.attempts.has_report(attempt):
                ends_at_s = min(ends_at_s, time.monotonic() + STEP_END_S)
            if self.asked is not None:
                ends_at_s = min(ends_at_s, self.asked_at_s)
            late_s = time.monotonic() - ends_at_s
            if late_s >= STEP_END_S:
                step.kill()
            elif late_s >= 0:
                step.terminate()

    def train(self, attempt: Attempt) -> int:
        """Run the ranks; their exit status, as srun tells it.

        Raises `SchedulerError` or ValueError if the first node cannot say where ranks meet.
        """
        log = self.attempts.srun_log(attempt)
        meeting = self.find_rendezvous(attempt, log)
        with log.open("a") as output:
            command = srun.training(self.submission, attempt.number, attempt.nodes, meeting)
            step = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            return self.watch(step, log)

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
            elif failed_at < 0 and scheduler.first_to_fail(read(log)) is not None:
                failed_at = now

    def wait(self, seconds: float) -> None:
        """Pause before the next attempt, or until a signal comes."""
        say(f"next attempt in {seconds:g} s")
        deadline = time.monotonic() + seconds
        while self.asked is None and time.monotonic() < deadline:
            time.sleep(min(0.2, seconds))

    def look_elsewhere(self, lost: dict[str, str]) -> int:
        """Go back to the queue for other nodes, if the partition has enough besides those that failed the
        preflight."""
        told = [f"{node} {state}" for node, state in lost.items()]
        told += [f"{node} failed preflight" for node in sorted(self.unfit - lost.keys())]
        num_sound, legal = len(self.allocated) - len(told), self.submission.legal_nodes
        reason = (
            f"{num_sound} of {len(self.allocated)} nodes are sound ({', '.join(told)}), the run needs one of "
            f"{legal}"
        )
        if self.unfit:
            # SLURM keeps those of earlier requeues from the job too: it would wait for them for ever.
            barred = {*self.unfit, *scheduler.excluded_nodes(self.job_id, PATIENCE_S)}
            others = scheduler.members(self.partition, PATIENCE_S) - barred
            if len(others) < legal[0]:
                return self.give_up(
                    f"{reason}, and partition {self.partition} has no more than {len(others)} others"
                )
        return self.requeue(reason)

    def requeue(self, reason: str) -> int:
        """Go back to the queue under the same id, unless the job was cancelled or SLURM sees to it itself."""
        state = scheduler.job_state(self.job_id, PATIENCE_S)
        if state != "RUNNING":
            say(f"{reason}; job {self.job_id} is {state}, so it is not put back into the queue by itself")
            return 1
        # Of a range SLURM gives the least, so that is what it has sound now, or else the fewest that will do.
        out = {*self.unusable(self.allocated), *self.unfit}
        legal, spares = self.submission.legal_nodes, self.submission.spare_nodes
        num_sound = len(self.allocated) - len(out)
        with_sound = max((number for number in legal if number <= num_sound), default=legal[0])
        least, most = with_sound if out else legal[-1], legal[-1] + spares
        nodes = scheduler.node_range(least, most)
        say(f"{reason}; job {self.job_id} goes back to the queue, for {nodes} nodes")
        if self.unfit:
            told = f"scontrol update JobId={self.job_id} ExcNodeList="
            say(f"it will not get {', '.join(sorted(self.unfit))} again; when they are mended: {told}")
        # SLURM ends a job that it requeues with all its processes, scontrol included, by SIGTERM first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        scheduler.requeue(self.job_id, least, most, self.unfit, PATIENCE_S)
        return 0

    def unusable(self, nodes: Sequence[str]) -> dict[str, str]:
        """Node -> state of those that SLURM finds unable to go on, or has taken from the job."""
        states = scheduler.unusable(nodes, PATIENCE_S)
        left = scheduler.nodes_of(self.job_id, PATIENCE_S)
        taken = {node: "no longer the job's" for node in nodes if left and node not in left}
        return taken | states

    def give_up(self, reason: str) -> int:
        """Say why, and what to do."""
        folder = self.attempts.folder(self.history()[-1])
        say(
            f"GIVEN UP: {reason}. The first errors stand in {folder}/rank_<R>.log, node_<NODE>.log and "
            f"preflight.log; when their cause is mended: sbatch {self.submission.run}/{SCRIPT}"
        )
        return 1


def read(log: Path) -> str:
    """What srun and the tools of a node have written, in whatever encoding; nothing where it cannot be read.

    A file system that is away for a moment must not end ranks that do well.
    """
    try:
        return log.read_text(errors="replace")
    except OSError:
        return ""


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
        nodes = scheduler.expand(os.environ["SLURM_JOB_NODELIST"])
        # It listens to signals from here on.
        supervisor = Supervisor(Submission.read(run), job_id, nodes, os.environ["SLURM_JOB_PARTITION"])
        lock.acquire(run, job_id, lambda job: scheduler.job_state(job, PATIENCE_S))
        status = supervisor.run()
        if scheduler.job_state(job_id, PATIENCE_S) == "RUNNING":
            lock.release(run, job_id)
    except (K25Error, OSError, ValueError) as error:
        say(f"{type(error).__name__}: {error}")
        sys.exit(2)
    sys.exit(status)


if __name__ == "__main__":
    main()
