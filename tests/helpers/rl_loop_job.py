"""A job of the loop alone: everything of `k25_train/rl` between tasks and step files, with a trainer whose
weights are a hash of what it is given. It takes about a second."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from k25_train.config.rollout import EngineKind
from k25_train.config.schema import Config
from k25_train.data.tokenizer import load_tokenizer
from k25_train.data.trajectories.reading import StepFile
from k25_train.data.trajectories.step_file import step_path
from tests.helpers.rl_runs import DYING, DyingEngine, ShortJudge
from tests.helpers.scripted_engine import ScriptedEngine

DONE, DIED = 0, 3
"""Statuses of a job: it has trained to the end; its engines died, and it said so."""
CHECKPOINT = "weights.json"


def loop_job(config: Config, engine: str) -> None:
    """The loop, with a trainer that hashes its steps' files and saves every other step."""
    from k25_train.errors import RolloutError
    from k25_train.rl.event_loop import EventLoop
    from k25_train.rl.loop import roll_out
    from k25_train.rl.room import Room
    from k25_train.rl.transports.in_memory import InMemory
    from k25_train.rl.transports.shared_memory import SharedMemory
    from k25_train.rollout.engines.base import EngineError

    folder = Path(config.run.dir)
    assert config.rollout is not None and config.algorithm is not None
    transport = InMemory() if config.rollout.engine is EngineKind.in_process else SharedMemory()
    loop = EventLoop()
    try:
        room = Room(config, loop, loop.wait(_furnish(config, engine)), folder / "checkpoints", print)
        first, weights = saved(folder)
        room.wait(room.begin(first))
        _push(room, transport, first, weights)
        for step in range(first + 1, config.train.steps + 1):
            room.wait(roll_out(room, step))
            weights = trained(weights, step_path(folder / "rollouts", step))
            if step % 2 == 0 or step == config.train.steps:
                _save(folder, step, weights)
            if step % config.algorithm.steps_per_rollout == 0:
                _push(room, transport, step, weights)
            room.wait(room.figures(step))
    except (EngineError, RolloutError) as error:
        # A task that is given up after several tries says of each what the engine said.
        if isinstance(error, RolloutError) and "engine_error" not in str(error):
            raise
        print(error, flush=True)
        os._exit(DIED)
    room.end()
    transport.close()


async def _furnish(config: Config, engine: str) -> Any:
    from k25_train.environments.environment import Services
    from k25_train.environments.sandboxes.none import NoSandboxes
    from k25_train.rl.room import Parts
    from k25_train.rl.tasks import TaskOrder
    from k25_train.rl.workplace import Workplace, served_model
    from k25_train.rollout.engines.pool import EnginePool
    from k25_train.rollout.engines.remote import connect_engines
    from k25_train.rollout.prompts import Prompts

    assert config.rollout is not None and config.environment is not None
    path = f"{config.data.dir}/tokenizer.json"
    tokenizer, kind = load_tokenizer(path), DyingEngine if engine == DYING else ScriptedEngine
    engines: list[Any] = [kind(pause_s=0.0003)]
    model = served_model(config, tokenizer)
    if config.rollout.engine is not EngineKind.in_process:
        engines = await connect_engines(config.rollout, model)
    judges: Any = ShortJudge()
    workplace = Workplace(
        model=model,
        tokenizer=tokenizer,
        prompts=Prompts(tokenizer, path, model, 40),
        judges=judges,
        services=Services(sandboxes=NoSandboxes(), judging=judges, tool_timeout_s=5.0),
        close=_nothing,
    )
    pool = EnginePool.of(engines, config.rollout.update_timeout_s)
    return Parts(
        pool=pool,
        workplace=workplace,
        tasks=TaskOrder(config.environment, config.train.seed),
        close=pool.close,
    )


async def _nothing() -> None:
    """Nothing is open."""


def trained(weights: str, path: Path) -> str:
    """Weights that depend on all that a step trains on, and on those before."""
    file = StepFile(path)
    digest = hashlib.sha256(f"{weights} {dict(file.state)} {file.facts}".encode())
    rows = file.everything()
    for array in (rows.tokens, rows.rollout_logprobs, rows.versions, rows.advantages, rows.policy_weights):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def tensors_of(weights: str) -> list[Any]:
    """What engines get of them."""
    import torch

    from k25_train.export.stream import NamedTensor

    return [NamedTensor("weights", torch.tensor(list(bytes.fromhex(weights))))]


def _push(room: Any, transport: Any, version: int, weights: str) -> None:
    """As `GatheredWay` does on the first rank, without the others."""
    taken = transport.take(tensors_of(weights), version)
    room.wait(room.pool.rebuild())
    room.wait(room.pool.update(taken, version))
    transport.committed(version)
    room.wait(room.pushed())


def saved(folder: Path) -> tuple[int, str]:
    """Step and weights of the checkpoint."""
    path = folder / CHECKPOINT
    if not path.exists():
        return 0, "00"
    step, weights = json.loads(path.read_text(encoding="utf-8"))
    return step, weights


def _save(folder: Path, step: int, weights: str) -> None:
    partial = folder / f"{CHECKPOINT}.partial"
    partial.write_text(json.dumps([step, weights]), encoding="utf-8")
    os.replace(partial, folder / CHECKPOINT)
