"""Runs whose engines are processes of their own: these die as well, and what was trained is looked through.

The scripted engine's tokens follow from weights, version, seed and position, and weights from what was
trained before. So every token that a run has trained can be drawn again here, with the weights of the
version that it is labelled with.
"""

from __future__ import annotations

import random
import time
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from k25_train.compose.resolve import compose
from k25_train.data.tokenizer import load_tokenizer
from k25_train.data.trajectories.reading import StepFile, TokenColumns
from k25_train.data.trajectories.step_file import step_path
from k25_train.rollout.prompts import Prompts
from tests.helpers.engine_servers import EngineServers
from tests.helpers.rl_crashes import CrashingRun
from tests.helpers.rl_loop_job import tensors_of, trained
from tests.helpers.scripted_engine import ENDS, drawn_at, logprob_of, token_of

NUM_SERVERS = 2
TICK_S = 0.01
LIMIT_S = 60
"""Of requests and updates: far more than they take. What would wait for it makes a run late, and is seen."""


@dataclass
class ServedRun(CrashingRun):
    """A run over HTTP, whose servers are killed and started again while its jobs run."""

    rng: random.Random = field(default_factory=random.Random)
    most_deaths: int = 0
    """Servers that may die."""
    gap_s: float = 2.0
    """Mean time between two of them that die at any moment."""
    servers: EngineServers = field(init=False)

    def __post_init__(self) -> None:
        config = compose(self.settings)
        pad = load_tokenizer(f"{config.data.dir}/tokenizer.json").media_pad
        self.servers = EngineServers(config.model, pad, self.rng, self.most_deaths)
        urls = ",".join(self.servers.start(NUM_SERVERS))
        limits = [f"rollout.{name}_timeout_s={LIMIT_S}" for name in ("request", "update")]
        self.settings += ["rollout.engine=vllm", f"rollout.urls=[{urls}]", *limits]

    def close(self) -> None:
        """End its servers."""
        self.servers.stop()

    def _watch(self, process: Any, seconds: float) -> None:
        end = time.monotonic() + seconds
        next_death = time.monotonic() + self.rng.expovariate(1 / self.gap_s)
        while process.is_alive() and time.monotonic() < end:
            process.join(TICK_S)
            self.servers.tend()
            if time.monotonic() >= next_death:
                self.servers.kill()
                next_death = time.monotonic() + self.rng.expovariate(1 / self.gap_s)

    def _job(self, killed_after_s: float | None, engine: str) -> bool:
        self.servers.ready()
        return super()._job(killed_after_s, engine)


def wrong_tokens(run: CrashingRun, num_steps: int) -> list[str]:
    """Responses of a run of the loop with a token that no engine draws with the weights of its version."""
    from k25_train.rl.tasks import TaskOrder
    from k25_train.rl.workplace import served_model

    config = compose(run.settings)
    assert config.environment is not None
    tasks, problems = TaskOrder(config.environment, config.train.seed), []
    path = f"{config.data.dir}/tokenizer.json"
    tokenizer = load_tokenizer(path)
    stop = Prompts(tokenizer, path, served_model(config, tokenizer), 40).stop_ids[0]
    weights, crcs = "00", list[int]()
    for step in range(1, num_steps + 1):
        crcs.append(_crc(weights))
        file = StepFile(step_path(run.folder / "rollouts", step))
        for number, facts in enumerate(file.facts):
            draw = tasks.draw(facts["group"])
            seed = tasks.seed_of(draw.task.key, draw.epoch, facts["sample"])
            if wrong := _wrong_with(file.rows(number), seed, stop, crcs):
                problems.append(f"step {step}, {file.names[number]}: {wrong}")
        weights = trained(weights, file.path)
    return problems


def _wrong_with(rows: TokenColumns, seed: int, stop: int, crcs: list[int]) -> str:
    """What is wrong with a response; `crcs` are those of the weights of each version that there was."""
    of = rows.generated
    found = zip(rows.tokens[of], rows.rollout_logprobs[of], rows.versions[of], strict=True)
    for position, (token, logprob, version) in enumerate(found):
        if not 0 <= version < len(crcs):
            return f"token {position} is of version {version}, which there was not"
        drawn = drawn_at(int(version), crcs[version], seed, position)
        due = token_of(drawn, position)
        if token != (stop if due == ENDS else due) or logprob != np.float32(logprob_of(drawn)):
            return f"token {position} is not what version {version} draws"
    return ""


def _crc(weights: str) -> int:
    (named,) = tensors_of(weights)
    return zlib.crc32(named.tensor.numpy().tobytes())
