"""One trial's run on the cluster: moments to wait for, processes to hit, and what is seen meanwhile."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.helpers.slurm_faults.evidence import Ended, Strike
from tests.helpers.slurm_faults.site import RUN, Site
from tests.helpers.submitted_run import SubmittedRun
from tests.helpers.torchrun_jobs import living, strings

TIMEOUT_S = 420.0
"""Longest wait for anything: machines are busy."""
LOOK_S = 0.1
SAMPLE_S = 0.7
OVER = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
HELD = ("held", "Held")
"""Parts of squeue's reason for a job that waits for a release."""


class MissedError(Exception):
    """A moment did not come: the run ended, or took too long."""


class Scene:
    """A submitted run that is about to be disturbed."""

    def __init__(self, site: Site, data: Path, folder: Path, overrides: list[str]) -> None:
        """Submit it."""
        self.site = site
        self.cluster = site.cluster
        self.folder = folder
        port = f"cluster.slurm.rendezvous_port={site.port}"
        self.run = SubmittedRun(site.cluster, data, folder / "run", *RUN, port, *overrides)
        self.job_id = self.run.job_id
        self.strikes: list[Strike] = []
        self.allocated: dict[int, list[str]] = {}
        self.comments: list[str] = []
        self.more: list[str] = []
        self.state, self.reason = "PENDING", ""
        self._sampled_s = -SAMPLE_S

    # What is seen.

    @property
    def attempt(self) -> Ended | None:
        """The newest attempt, if any has started."""
        attempts = self.attempts()
        return attempts[-1] if attempts else None

    def attempts(self) -> list[Ended]:
        """The records of all attempts so far, oldest first."""
        found = []
        for path in (self.run.folder / "attempts").glob("*/attempt.json"):
            if path.parent.name.isdecimal():
                # It may be replaced at this moment.
                with suppress(OSError, ValueError):
                    found.append(ended(json.loads(path.read_text())))
        return sorted(found, key=lambda attempt: attempt.number)

    def step(self) -> int:
        """The newest step in the metrics, of which some lines may be damaged."""
        path = self.run.folder / "metrics.jsonl"
        content = path.read_text(errors="replace") if path.exists() else ""
        return max(map(int, re.findall(r'^\{"step": (\d+),', content, re.MULTILINE)), default=0)

    def sample(self, *, at_once: bool = False) -> None:
        """Ask SLURM about the job, unless it was asked just now; it may be down."""
        if not at_once and time.monotonic() - self._sampled_s < SAMPLE_S:
            return
        command = ["squeue", "--noheader", f"--jobs={self.job_id}", "--states=all", "--format=%T|%r|%N|%k"]
        answer = self.cluster.try_to(*command)
        self._sampled_s = time.monotonic()
        if answer.returncode != 0 or answer.stdout.count("|") < 3:
            return
        self.state, self.reason, nodes, comment = answer.stdout.strip().split("|", 3)
        if comment not in ("(null)", *self.comments[-1:]):
            self.comments.append(comment)
        attempt = self.attempt
        if self.state == "RUNNING" and attempt is not None and attempt.outcome is None:
            names = self.cluster.try_to("scontrol", "show", "hostnames", nodes).stdout.split()
            self.allocated[attempt.number] = names

    @property
    def is_over(self) -> bool:
        """Whether the job has ended, or is held in the queue."""
        return self.state in OVER or self.is_held

    @property
    def is_held(self) -> bool:
        """Whether SLURM keeps the job in the queue until somebody releases it."""
        return self.state == "PENDING" and any(word in self.reason for word in HELD)

    # Waiting.

    def wait_until(self, happened: Callable[[], bool], *, also_over: bool = False) -> None:
        """Return as soon as it happened. Raises MissedError if it does not, or the job is over before."""
        deadline = time.monotonic() + TIMEOUT_S
        while not happened():
            self.sample()
            if self.is_over and not also_over and not happened():
                raise MissedError(f"the job is {self.state} before the moment")
            if time.monotonic() >= deadline:
                raise MissedError(f"not within {TIMEOUT_S:g} s; job {self.state}, {self.reason}")
            time.sleep(LOOK_S)

    def wait_for_step(self, step: int, attempt: int = 1) -> None:
        """Return when an attempt has trained up to a step."""
        self.wait_until(lambda: len(self.attempts()) >= attempt and self.step() >= step)

    def wait_for_ranks(self) -> None:
        """Return when all ranks of the newest attempt have been started."""
        self.wait_until(lambda: self.attempt is not None and len(self.ranks()) == len(self.attempt.nodes))

    def wait_for_end(self) -> str:
        """The job's state when it is over, or held."""
        self.sample(at_once=True)
        self.wait_until(lambda: self.is_over, also_over=True)
        return self.state

    def wait_within(self, happened: Callable[[], bool], seconds: float) -> None:
        """Return as soon as it happened, or when the time is over."""
        deadline = time.monotonic() + seconds
        while not happened() and time.monotonic() < deadline:
            time.sleep(LOOK_S)

    def pause(self, seconds: float) -> None:
        """Let time pass."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.sample()
            time.sleep(LOOK_S)

    # Hitting.

    def note(self, node: str | None) -> None:
        """Note that the disturbance takes place now."""
        attempt = self.attempt
        self.strikes.append(Strike(attempt=attempt.number if attempt else 0, node=node, step=self.step()))

    def node_of(self, rank: int) -> str:
        """The node of a rank of the newest attempt, which has one on each of its nodes."""
        assert self.attempt is not None
        return self.attempt.nodes[rank % len(self.attempt.nodes)]

    def ranks(self) -> dict[str, int]:
        """Node -> its rank's process, in the newest attempt."""
        found = {}
        mark = f"{self.run.folder}/attempts/{self.attempt.number if self.attempt else 0}"
        for pid in self.run.processes():
            words, variables = strings(pid, "cmdline"), strings(pid, "environ")
            if "launch.rank" in words[:4] and mark in words and any(v.startswith("RANK=") for v in variables):
                found[variable(variables, "SLURMD_NODENAME")] = pid
        return found

    def torchrun(self, node: str) -> int:
        """The process that started a node's rank."""
        parents = {pid: strings(pid, "environ") for pid in self.run.processes()}
        for pid, variables in parents.items():
            words = strings(pid, "cmdline")
            is_rank = any(text.startswith("RANK=") for text in variables)
            if not is_rank and "launch.agent" in words and variable(variables, "SLURMD_NODENAME") == node:
                return pid
        raise MissedError(f"no torchrun on {node}")

    def supervisor(self) -> int:
        """The supervisor's process."""
        for pid in living():
            words = strings(pid, "cmdline")
            if "launch.supervisor" in words and str(self.run.folder) in words:
                return pid
        raise MissedError("no supervisor")

    def kill(self, pid: int, number: signal.Signals) -> None:
        """Send a process a signal; it may have ended."""
        try:
            os.kill(pid, number)
        except ProcessLookupError as error:
            raise MissedError(f"process {pid} has ended") from error

    @contextmanager
    def held(self, node: str) -> Iterator[None]:
        """Hold a node's rank still, so that the run does not end before something slow takes place."""
        self.wait_until(lambda: node in self.ranks())
        pid = self.ranks()[node]
        self.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def submit_again(self, *options: str) -> list[int]:
        """Queue the run's script again, as a user does; returns the job's id, or none if it is refused."""
        command = ["sbatch", "--parsable", *options, str(self.run.folder / "submit.sbatch")]
        answer = self.cluster.try_to(*command)
        return [int(answer.stdout.split(";")[0])] if answer.returncode == 0 else []

    def follow(self, jobs: list[int]) -> None:
        """Watch this job of the run from now on."""
        for job_id in jobs:
            self.job_id, self.state = job_id, "PENDING"

    def excluded(self) -> list[str]:
        """Nodes that the job is not to get any more."""
        shown = self.cluster.try_to("scontrol", "show", "job", str(self.job_id)).stdout
        match = re.search(r"ExcNodeList=(\S+)", shown)
        if match is None or match[1] == "(null)":
            return []
        return self.cluster.try_to("scontrol", "show", "hostnames", match[1]).stdout.split()

    def processes(self) -> dict[int, str]:
        """Living processes of the run, supervisor included, with what they are."""
        mark = str(self.run.folder)
        found = {pid: strings(pid, "cmdline") for pid in living()}
        return {
            pid: " ".join(words)[:120] for pid, words in found.items() if any(mark in word for word in words)
        }

    def launch(self, *overrides: str) -> list[str]:
        """The command that submits the run, with more overrides."""
        return [sys.executable, "-m", *self.run.command, *overrides]


def variable(variables: list[str], name: str) -> str:
    """A variable of a process's environment; empty if it has none."""
    return next((text.partition("=")[2] for text in variables if text.startswith(f"{name}=")), "")


def ended(record: dict[str, Any]) -> Ended:
    """What the record of an attempt says."""
    blame = record.get("blame")
    return Ended(
        number=record["number"],
        nodes=record["nodes"],
        outcome=record["outcome"],
        reached=record["reached"],
        blamed=blame["node"] if blame else record["first_to_fail"],
        left_out=list(record.get("left_out", ())),
        reason=record["reason"],
    )
