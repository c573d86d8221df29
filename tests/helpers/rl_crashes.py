"""Runs of reinforcement learning that are killed at drawn moments, and what must be true of them afterwards.

Two kinds of jobs, both with everything of `k25_train/rl` between tasks and step files:

    loop       the loop with a trainer whose weights are a hash of what it is given (`rl_loop_job.py`)
    training   `Trainer.fit` with a shrunk model
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from k25_train.compose.resolve import compose
from k25_train.data.trajectories.reading import StepFile
from k25_train.data.trajectories.step_file import step_path
from k25_train.rollout.journal import journal_files
from k25_train.rollout.records import records_in
from tests.helpers.ranks import RankContext, free_port, start_context
from tests.helpers.rl_loop_job import DIED, DONE, loop_job, saved
from tests.helpers.rl_runs import DYING, SCRIPTED, fit_rl


def training_job(context: RankContext, arguments: list[str], engine: str) -> None:
    """A run as the command starts it."""
    from k25_train.errors import RolloutError
    from k25_train.rollout.engines.base import EngineError

    os.environ.update(context.environment())
    try:
        fit_rl(context, arguments, engine)
    except (EngineError, RolloutError) as error:
        if isinstance(error, RolloutError) and "engine_error" not in str(error):
            raise
        os._exit(DIED)


def start_server() -> None:
    """Start what jobs are forked from, which takes seconds once."""
    process = start_context("cpu").Process(target=int)
    process.start()
    process.join()


def _job_main(job: Callable[..., None], log: Path, *arguments: Any) -> None:
    """What a forked process does: the job, with its output in a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    job(*arguments)
    os._exit(DONE)


@dataclass
class CrashingRun:
    """One run, whose jobs are killed until it is done."""

    folder: Path
    settings: list[str]
    trains: bool
    """Whether its jobs are of the second kind."""
    num_kills: int = 0
    num_deaths: int = 0
    """Engines that died."""
    acknowledged: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """Group and sample -> ids that some journal had after a kill."""
    problems: list[str] = field(default_factory=list)

    def to_the_end(self) -> float:
        """Run it without a kill; seconds that it took."""
        started = time.monotonic()
        self._job(None, SCRIPTED)
        return time.monotonic() - started

    def killed_to_the_end(self, rng: random.Random, life_s: float, most: int) -> None:
        """Kill its jobs at moments of a life of `life_s`, at most `most` of them, until it is done."""
        is_done = False
        while not is_done:
            kills = self.num_kills < most
            engine = DYING if kills and rng.random() < 0.1 else SCRIPTED
            is_done = self._job(rng.uniform(0, life_s) if kills else None, engine)
            self._take_note()

    def _job(self, killed_after_s: float | None, engine: str) -> bool:
        """One job; whether the run is done."""
        config = compose(self.settings)
        log = self.folder.with_suffix(".log")
        Path(config.run.dir).mkdir(parents=True, exist_ok=True)
        arguments: tuple[Any, ...] = (loop_job, log, config, engine)
        if self.trains:
            arguments = (training_job, log, RankContext(0, 1, free_port()), self.settings, engine)
        process = start_context("cpu").Process(target=_job_main, args=arguments, daemon=True)
        process.start()
        self._watch(process, killed_after_s if killed_after_s is not None else 600.0)
        if process.is_alive():
            process.kill()
            process.join()
            self.num_kills += 1
            return False
        self.num_deaths += process.exitcode == DIED
        if process.exitcode not in (DONE, DIED):
            text = log.read_text(encoding="utf-8")[-1500:]
            raise AssertionError(f"{self.folder}: a job ended with {process.exitcode}: {text}")
        return bool(process.exitcode == DONE)

    def _watch(self, process: Any, seconds: float) -> None:
        """Wait until a job has ended, and no longer than this."""
        process.join(seconds)

    def _take_note(self) -> None:
        """Remember what the journal has: it is acknowledged, and may not change or go any more."""
        found: dict[tuple[int, int], list[int]] = {}
        for path in journal_files(self.folder / "rollouts/journal"):
            for record, _ in records_in(path.read_bytes()):
                if record.header["kind"] == "segment":
                    key = record.header["group"], record.header["sample"]
                    found.setdefault(key, []).extend(record.arrays["token_ids"].tolist())
        for key, tokens in self.acknowledged.items():
            if found.get(key, [])[: len(tokens)] != tokens:
                self.problems.append(f"group {key[0]}, sample {key[1]}: acknowledged tokens are gone")
        self.acknowledged |= found

    def close(self) -> None:
        """End what its jobs leave."""

    def check(self, reference: CrashingRun | None, num_steps: int, per_step: int, size: int) -> list[str]:
        """What is wrong with the finished run; `reference` was never killed, None if weights may differ."""
        seen: dict[tuple[int, int], int] = {}
        for step in range(1, num_steps + 1):
            file = StepFile(step_path(self.folder / "rollouts", step))
            for number, facts in enumerate(file.facts):
                key = facts["group"], facts["sample"]
                if key in seen:
                    self.problems.append(f"{key} trained in step {seen[key]} and again in step {step}")
                seen[key] = step
                rows = file.rows(number)
                kept = self.acknowledged.get(key, [])
                if rows.tokens[rows.generated].tolist()[: len(kept)] != kept:
                    self.problems.append(f"{key}: step {step} lacks tokens that were acknowledged")
        wanted = {(group, sample) for group in range(num_steps * per_step) for sample in range(size)}
        if seen.keys() != wanted:
            self.problems.append(f"never trained: {sorted(wanted - seen.keys())[:5]}")
        if reference is not None and self.weights() != reference.weights():
            self.problems.append("final weights are not those of the run without a kill")
        return self.problems

    def weights(self) -> Mapping[str, str]:
        """What tells the final weights: digests of the last checkpoint's tensors."""
        if not self.trains:
            return {"weights": saved(self.folder)[1]}
        from safetensors.numpy import load_file

        newest = (self.folder / "checkpoints/latest").read_text(encoding="utf-8").strip()
        found = {}
        for path in sorted((self.folder / "checkpoints" / newest).glob("*.safetensors")):
            for name, tensor in load_file(path).items():
                found[f"{path.name}/{name}"] = hashlib.sha256(np.ascontiguousarray(tensor)).hexdigest()
        return found
