"""Rollouts of several turns whose manager, shards and engines are killed: each ends once, none is lost.

    python -m tests.bench.rollout_crashes [--kills 50] [--tasks 2000] [--per-step 40] [--seed 0] [--dir DIR]

A job (`helpers/rollout_crash_job`) makes all tasks twice: left alone, and with `--kills` times `kill -9`, of
the first rank, which has the manager and the journal; of a shard, which has the gateway of its agents; and of
an engine server. Afterwards the journal has one end and one verdict of each task, no step has one that
another has had, every token is one that the engines draw with the weights of its version, and the lengths are
of the same distribution as those of the job that was left alone (Kolmogorov and Smirnov).

Prints the violations and the p-value last; ends with status 1 if there are any, or p is below 0.01.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from k25_train.data.mix.permutation import key_of
from k25_train.rollout.journal import journal_files
from k25_train.rollout.records import records_in
from tests.helpers.engine_servers import EngineServers
from tests.helpers.project_sources import REPO
from tests.helpers.rollout_crash_job import PAD, crc_of, seed_of, step_file
from tests.helpers.rollout_sections import composed
from tests.helpers.scripted_engine import ENDS, drawn_at, logprob_of, token_of
from tests.helpers.scripted_rollouts import STOP

KINDS = ("manager", "shard", "engine")
LEAST_P = 0.01
NUM_SERVERS = 2
TICK_S = 0.01
LIMIT_S = 1500.0
MOST_PAUSE_S = 1.5
"""Longest time from a step to the next kill: several steps are at work at once."""


@dataclass
class Trial:
    """A job, its engines, and what is killed."""

    folder: Path
    num_steps: int
    per_step: int
    rng: random.Random
    kills: list[str] = field(default_factory=list)
    """What is killed, in order."""
    done: Counter[str] = field(default_factory=Counter)
    """What was."""
    starts: int = 0
    ends: int = 0
    """Jobs that ended by themselves because no engine was left."""
    job: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """To the end. Raises AssertionError where that takes too long."""
        self.folder.mkdir(parents=True)
        most = self.kills.count("engine")
        self.servers = EngineServers(composed().model, PAD, self.rng, most, dies_in_calls=False)
        self.urls, self.deadline = self.servers.start(NUM_SERVERS), time.monotonic() + LIMIT_S
        try:
            # A kill for each so many steps, so that all of them fall into the job.
            for number, kind in enumerate(self.kills):
                self._until_step(self.num_steps * number // len(self.kills))
                self._let_run(self.rng.uniform(0.0, MOST_PAUSE_S))
                self._kill(kind)
            self._until_step(self.num_steps)
            while self._tend():
                time.sleep(TICK_S)
        finally:
            if self.job is not None:
                self.job.kill()
                self.job.wait()
            self.servers.stop()

    def _until_step(self, step: int) -> None:
        while step and not step_file(self.folder, step).exists():
            assert time.monotonic() < self.deadline, f"step {step} does not come: see {self.folder}/job.log"
            self._tend()
            time.sleep(TICK_S)

    def _let_run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._tend()
            time.sleep(TICK_S)

    def _tend(self) -> bool:
        """Start whatever is dead again; whether the job is at work."""
        self.servers.tend()
        if self.job is not None and (status := self.job.poll()) is not None:
            if status == 0:
                return False
            assert status in (3, -signal.SIGKILL), f"status {status}: see {self.folder}/job.log"
            self.ends += status > 0
            self.job = None
        if self.job is None:
            self.starts += 1
            command = [sys.executable, "-m", "tests.helpers.rollout_crash_job", str(self.folder)]
            with (self.folder / "job.log").open("ab") as log:
                self.job = subprocess.Popen(
                    [*command, str(self.num_steps), str(self.per_step), *self.urls],
                    cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)}, stdout=log, stderr=log,
                )  # fmt: skip
        return True

    def _kill(self, kind: str) -> None:
        """Kill one of a kind, as soon as there is one."""
        before = len(self.servers.deaths)
        while time.monotonic() < self.deadline:
            if not self._tend():
                return
            assert self.job is not None
            if kind == "engine":
                self.servers.kill()
                if len(self.servers.deaths) > before:
                    break
            victims = [self.job.pid] if kind == "manager" else shards_of(self.job.pid)
            if kind != "engine" and victims:
                os.kill(self.rng.choice(victims), signal.SIGKILL)
                if kind == "manager":
                    self.job.wait()
                break
            time.sleep(TICK_S)
        self.done[kind] += 1


def shards_of(job: int) -> list[int]:
    """Processes of a job's shards."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text(encoding="ascii").rpartition(")")[2].split()[1])
            if parent == job and b"rollout.shards.shard" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except (OSError, ValueError):
            continue
    return found


def violations(trial: Trial) -> list[str]:
    """What is wrong with what a job has left."""
    num_tasks, problems = trial.num_steps * trial.per_step, list[str]()
    # 1. One verdict, one end of each attempt that has one, the last one's among them, and no segment twice.
    # An attempt that was killed between its end and its verdict may start over: its environment is gone.
    seen: Counter[tuple[Any, ...]] = Counter()
    attempts: Counter[int] = Counter()
    for path in journal_files(trial.folder / "journal"):
        for record, _ in records_in(path.read_bytes()):
            header = record.header
            match header["kind"]:
                case "judged" | "admitted" as kind:
                    seen[kind, header["group"]] += 1
                case "ended":
                    seen["ended", header["group"], header["attempt"]] += 1
                case "segment":
                    seen["segment", header["group"], header["segment"]] += 1
                case "restarted":
                    attempts[header["group"]] = header["attempt"]
    problems += [f"{key} is in the journal {count} times" for key, count in seen.items() if count != 1]
    for kind in ("admitted", "judged"):
        problems += [f"task {n} has no record {kind}" for n in range(num_tasks) if not seen[kind, n]]
    problems += [f"task {n} has no end" for n in range(num_tasks) if not seen["ended", n, attempts[n]]]

    # 2. Every task in one step, and as the engines drew it.
    trained: Counter[int] = Counter()
    for step in range(1, trial.num_steps + 1):
        for told in told_of(trial, step):
            trained[told["group"]] += 1
            if wrong := wrong_with(told):
                problems.append(f"step {step}, task {told['group']}: {wrong}")
    problems += [f"task {n} was trained {trained[n]} times" for n in range(num_tasks) if trained[n] != 1]
    return problems


def told_of(trial: Trial, step: int) -> list[dict[str, Any]]:
    """What a step was given."""
    found: list[dict[str, Any]] = json.loads(step_file(trial.folder, step).read_text(encoding="ascii"))
    return found


def wrong_with(told: dict[str, Any]) -> str:
    """What is wrong with the tokens of a response; empty for nothing."""
    seed, turn, position, was_drawn = seed_of(told["task"], 0), -1, 0, False
    for token, logprob, version in zip(told["tokens"], told["logprobs"], told["versions"], strict=True):
        if version < 0:
            was_drawn = False
            continue
        turn, position = (turn, position + 1) if was_drawn else (turn + 1, 0)
        was_drawn = True
        of_turn = key_of(seed, "turn", turn) >> 1 if turn else seed
        drawn = drawn_at(version, crc_of(version), of_turn, position)
        due = token_of(drawn, position)
        if token != (STOP if due == ENDS else due) or np.float32(logprob) != np.float32(logprob_of(drawn)):
            return f"token {position} of turn {turn} is not what version {version} draws"
    return "" if turn + 1 == told["turns"] else f"{turn + 1} turns, not {told['turns']}"


def lengths(trial: Trial) -> list[int]:
    """Tokens of every response that was trained."""
    steps = range(1, trial.num_steps + 1)
    return [len(told["tokens"]) for step in steps for told in told_of(trial, step)]


def ks_p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Of the test of Kolmogorov and Smirnov that both are of one distribution; asymptotic, so that ties make
    it larger than it is."""
    points = np.unique([*first, *second])
    shares = [np.searchsorted(np.sort(each), points, side="right") / len(each) for each in (first, second)]
    distance = float(np.abs(shares[0] - shares[1]).max())
    root = math.sqrt(len(first) * len(second) / (len(first) + len(second)))
    scaled = (root + 0.12 + 0.11 / root) * distance
    if scaled < 0.2:
        return 1.0
    terms = (2 * (-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, sum(terms)))


def main(arguments: list[str] | None = None) -> int:
    """Kill as many as were asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--per-step", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path)
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    kinds = [KINDS[number % len(KINDS)] for number in range(options.kills)]
    rng.shuffle(kinds)
    with tempfile.TemporaryDirectory(prefix="k25_rollout_crashes_") as scratch:
        folder, found, trials = options.dir or Path(scratch), list[str](), list[Trial]()
        for name, kills in (("alone", []), ("killed", kinds)):
            trial = Trial(folder / name, options.tasks // options.per_step, options.per_step, rng, kills)
            began = time.monotonic()
            trial.run()
            told = violations(trial)
            found += told
            print(
                f"{name}: {options.tasks:,} tasks in {time.monotonic() - began:.0f} s, {trial.starts} jobs, "
                f"{trial.ends} of which no engine was left to; killed: {dict(trial.done)}",
                *(f"    VIOLATION: {each}" for each in told[:20]),
                sep="\n",
                flush=True,
            )
            trials.append(trial)
        alone, killed = map(lengths, trials)
    p = ks_p_value(alone, killed)
    print(f"tokens of a response: {np.mean(alone):.2f} left alone, {np.mean(killed):.2f} killed")
    kills = trials[1].done.total()
    print(
        f"{kills} kills over {options.tasks:,} tasks: {len(found)} violations (bar: 0), p = {p:.3f} that "
        f"lengths are of one distribution (bar: at least {LEAST_P})"
    )
    return 0 if not found and p >= LEAST_P and kills == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
