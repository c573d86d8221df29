"""A controller with a scripted engine, tasks of sums, and prompts and judges that need no vocabulary."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from k25_train.config.algorithm import AlgorithmConfig, OtherVersions, PolicyForm, ToggleConfig
from k25_train.config.environment import EnvironmentConfig, TaskSourceConfig
from k25_train.config.rollout import EngineKind, EngineWeights, RolloutConfig, Transport
from k25_train.environments.base import Response, Task, Verdict, scored
from k25_train.environments.environment import Action, Judging, Services, Tool
from k25_train.environments.sandboxes.none import NoSandboxes
from k25_train.rl.controller import Controller
from k25_train.rl.counts import Counts
from k25_train.rl.tasks import TaskOrder
from k25_train.rl.toggle import NoToggle
from k25_train.rollout.asking import Asking
from k25_train.rollout.engines.pool import EnginePool
from k25_train.rollout.journal import Journal
from k25_train.rollout.journal_state import consumed
from k25_train.rollout.local import LocalRollouts, Parts
from k25_train.rollout.manager.manager import RolloutManager
from k25_train.rollout.prompts import Message
from k25_train.rollout.trajectory import Group
from k25_train.rollout.turns import Observed
from tests.helpers.rollout_sections import manager_section, sandbox_section
from tests.helpers.scripted_engine import ScriptedEngine

STOP, FORBIDDEN = 250, 251


def algorithm_config(**changes: Any) -> AlgorithmConfig:
    values: dict[str, Any] = {
        "prompts_per_step": 2, "group_size": 3, "form": PolicyForm.token, "ratio_low": 0.5,
        "ratio_high": 2.0, "ratio_penalty": 0.02, "normalize_advantages": False,
        "skip_equal_rewards": False, "other_versions": OtherVersions.train, "ptx_coeff": 0.0,
        "steps_per_rollout": 1, "max_staleness": 0, "token_cap": None,
        "toggle": ToggleConfig(
            enabled=False, interval=2, accuracy=0.5, percentile=0.5, samples=4, min_correct=1
        ),
    }  # fmt: skip
    known = {name: value for name, value in values.items() if name in AlgorithmConfig.__dataclass_fields__}
    return AlgorithmConfig(**_completed(known) | changes)


def _completed(values: dict[str, Any]) -> dict[str, Any]:
    """Fields that came later, as `algorithm=k25` has them."""
    missing = set(AlgorithmConfig.__dataclass_fields__) - set(values)
    return values | {name: _as_chosen()[name] for name in missing}


@lru_cache
def _as_chosen() -> dict[str, Any]:
    from k25_train.compose.resolve import compose_values

    chosen: dict[str, Any] = compose_values(["experiment=rl_smoke"])[0]["algorithm"]
    return chosen


def rollout_config(**changes: Any) -> RolloutConfig:
    values: dict[str, Any] = {
        "engine": EngineKind.in_process, "urls": [], "weights": EngineWeights.float32,
        "transport": Transport.shared_memory, "max_prompt_tokens": 32, "max_tokens": 16, "temperature": 1.0,
        "max_running": 4, "threads": 0, "request_timeout_s": 20.0, "max_attempts": 3,
        "judge_timeout_s": 5.0, "update_timeout_s": 5.0, "probe_sequences": 1, "probe_tolerance": 1e-4,
        "eval_tasks": 4, "judge_url": None, "judge_model": None, "judge_version": None,
        "judge_max_tokens": 64,
    }  # fmt: skip
    return RolloutConfig(**{"manager": manager_section()} | values | changes)


class PlainPrompts:
    """Prompts of a task's key, letter by letter."""

    stop_ids = (STOP,)
    forbidden_ids = (FORBIDDEN,)

    def encode(self, task: Task) -> tuple[int, ...]:
        return tuple(task.key.encode()[-8:])

    def opening(
        self,
        task: str,
        messages: Sequence[Message],
        media: tuple[bytes, ...],
        tools: Sequence[Tool],
        *,
        thinking: bool,
    ) -> Observed:
        return Observed(tuple(task.encode()[-8:]), media)

    def following(
        self,
        task: str,
        messages: Sequence[Message],
        media: tuple[bytes, ...],
        *,
        thinking: bool,
        last_id: int | None = None,
    ) -> Observed:
        return Observed(tuple(str(messages[0]["content"]).encode()), media)

    def shortened(self, message: Message, max_tokens: int) -> Message:
        return message

    def action(self, token_ids: np.ndarray | Sequence[int], *, thinking: bool) -> Action:
        return Action(content=self.decode(token_ids))

    def decode(self, token_ids: np.ndarray | Sequence[int]) -> str:
        return " ".join(map(str, token_ids))

    def expanded(self, token_ids: Sequence[int], images: Sequence[bytes]) -> np.ndarray:
        return np.array(token_ids, np.int32)

    def collapsed(self, token_ids: np.ndarray) -> tuple[int, ...]:
        return tuple(token_ids.tolist())

    def num_media(self, token_ids: np.ndarray) -> int:
        return 0


class LengthJudge:
    """Rewards by the first token; `faults` are verdicts or errors that come first."""

    def __init__(self, faults: Sequence[Verdict | Exception] = ()) -> None:
        self.faults = list(faults)
        self.judged = 0

    async def judge(self, task: Task, response: Response) -> Verdict:
        self.judged += 1
        if self.faults:
            fault = self.faults.pop(0)
            if isinstance(fault, Exception):
                raise fault
            return fault
        reward = float(int(response.text.split()[0]) % 2)
        return scored(reward, {"accuracy": reward})


class _Present:
    """Whichever judge the process has at present."""

    def __init__(self, rollouts: "Rollouts") -> None:
        self._rollouts = rollouts

    async def judge(self, task: Task, response: Response) -> Verdict:
        return await self._rollouts.judge.judge(task, response)


@dataclass
class Rollouts:
    """One process of a run: what a kill ends, and another goes on with."""

    folder: Path
    algorithm: AlgorithmConfig = field(default_factory=algorithm_config)
    rollout: RolloutConfig = field(default_factory=rollout_config)
    engine: ScriptedEngine = field(default_factory=ScriptedEngine)
    judge: Judging = field(default_factory=LengthJudge)
    prompts: PlainPrompts = field(default_factory=PlainPrompts)
    rubrics: dict[str, float] | None = None
    num_steps: int = 4
    num_tasks: int = 50

    def run[T](self, use: Callable[["Rollouts"], Coroutine[Any, Any, T]]) -> T:
        """Open the journal, use the controller, and let all of it go without a word."""

        async def inside() -> T:
            self.pool = EnginePool.of([self.engine], self.rollout.update_timeout_s)
            self.counts, self.notices = Counts(), list[str]()
            source = TaskSourceConfig(family="sums", num_tasks=self.num_tasks, rubrics=self.rubrics)
            self.tasks = TaskOrder(
                EnvironmentConfig(tasks={"sums": source}, epochs=10, sandbox=sandbox_section()), seed=5
            )
            self.journal = Journal(self.folder, notice=self.notices.append)
            self.services = Services(
                sandboxes=NoSandboxes(), judging=_Present(self), tool_timeout_s=self.rollout.judge_timeout_s
            )
            self.rollouts = LocalRollouts(
                self.rollout,
                Parts(
                    asking=Asking(self.rollout, 256, self.pool, self.counts.add),
                    prompts=self.prompts,
                    services=self.services,
                    manager=RolloutManager(
                        self.rollout.manager, engines=self.pool, notice=self.notices.append
                    ),
                    count=self.counts.add,
                ),
            )
            self.controller = Controller(
                self.algorithm,
                self.num_steps,
                self.tasks,
                self.journal,
                self.pool,
                self.rollouts,
                self.counts,
            )
            try:
                return await use(self)
            finally:
                await self.controller.close()
                await self.rollouts.close()
                self.journal.close()

        return asyncio.run(inside())

    async def push(self, version: int) -> None:
        await self.pool.update([], version)
        self.controller.pushed()

    async def step(self, step: int) -> list[Group]:
        """Push, take, and consume the groups of a phase."""
        await self.push(step - 1)
        groups = await self.controller.take(step, NoToggle())
        self.consume(step, groups)
        return groups

    def consume(self, step: int, groups: Sequence[Group]) -> None:
        size = self.algorithm.prompts_per_step
        for first in range(0, len(groups), size):
            numbers = tuple(group.number for group in groups[first : first + size])
            self.journal.append(consumed(step + first // size, numbers))
        self.journal.flush()


def told(groups: Sequence[Group]) -> list[tuple[Any, ...]]:
    """Everything of groups that a step is made of, to be compared."""
    return [
        (
            group.number,
            group.task,
            response.token_ids.tolist(),
            response.logprobs.tolist(),
            response.versions.tolist(),
            response.verdict.as_json() if response.verdict else None,
        )
        for group in groups
        for response in group.responses
    ]
