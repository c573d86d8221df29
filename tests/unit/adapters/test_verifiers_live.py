"""verifiers as published, in its own Python: a taskset as users write them trains through our gateway."""

import asyncio
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k25_train.environments.adapters.verifiers import VerifiersEnvironment, VerifiersTasks
from k25_train.environments.adapters.verifiers_server import server_of, stop_servers
from k25_train.environments.base import Response, Verdict
from k25_train.environments.environment import EnvironmentFaultError, Services
from k25_train.environments.family import Split
from k25_train.environments.sandboxes.none import NoSandboxes
from k25_train.errors import ConfigError
from k25_train.rollout.gateway.agents import GatewayAgents
from k25_train.rollout.trajectory import Ended
from tests.helpers.acting_agents import PlainScope
from tests.helpers.foreign_python import foreign_python
from tests.helpers.gateway_parts import END, gateway_stage
from tests.helpers.rollout_sections import manager_section

pytestmark = pytest.mark.slow
TOYSET = """
import verifiers.v1 as vf

class SumData(vf.TaskData):
    answer: str

class SumTask(vf.Task[SumData, vf.State]):
    @vf.reward
    async def correct(self, trace: vf.Trace) -> float:
        return float(self.data.answer == (trace.last_reply or ""))

class SumSet(vf.Taskset[SumTask]):
    def load(self):
        return [SumTask(SumData(prompt=f"{n}+{n}?", answer=str(2 * n)), self.config.task) for n in range(40)]

__all__ = ["SumSet"]
"""
SERVICES = Services(sandboxes=NoSandboxes(), judging=SimpleNamespace(), tool_timeout_s=30)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("verifiers")
    given = os.environ.get("K25_VERIFIERS_PYTHON")
    python = Path(given) if given else foreign_python(folder / "venv", "verifiers==0.4.0")
    (folder / "toyset.py").write_text(TOYSET)
    return {"python": str(python), "taskset": "toyset", "path": str(folder), "workers": "1"}


def says(prompt: str) -> str:
    """Right for even numbers, wrong for odd ones."""
    numbers = re.findall(r"(\d+)\+\d+\?", prompt)
    n = int(numbers[-1])
    return f"{2 * n if n % 2 == 0 else 'none'}{END}"


def test_an_unmodified_taskset_finishes_an_episode_with_trainable_tokens(
    options: dict[str, str], tmp_path: Path
) -> None:
    tasks = VerifiersTasks(options)
    chosen = [tasks.task(Split.TRAIN, number) for number in range(4)]
    tasks.check_sizes(30, 1)

    async def played() -> list[tuple[Any, Verdict, Any]]:
        async with gateway_stage(tmp_path, says) as stage, asyncio.timeout(200):
            agents = GatewayAgents(stage.prompts, NoSandboxes(), manager_section(), stage.counts.append)

            async def one(task: Any) -> tuple[Any, Verdict, Any]:
                trial = stage.open(task.key)
                environment = VerifiersEnvironment(replace(task, thinking=False), SERVICES)
                recorded: Any = trial.recorded
                scope: Any = PlainScope()
                try:
                    opening = await environment.reset()
                    acted = await agents.act(
                        replace(task, thinking=False), environment, opening, recorded, scope
                    )
                    return acted, await environment.judge(Response(text="", num_tokens=1, ended=True)), trial
                finally:
                    await environment.close()

            try:
                found = await asyncio.gather(*map(one, chosen))
                assert stage.mismatches([trial for _, _, trial in found]) == []
                return found
            finally:
                await agents.close()
                await stop_servers()

    for task, (acted, verdict, trial) in zip(chosen, asyncio.run(played()), strict=True):
        n = int(task.messages[0]["content"].split("+")[0])
        assert acted.ended is Ended.STOP
        assert verdict.reward == float(n % 2 == 0)
        assert verdict.parts == {"correct": verdict.reward}
        (branch,) = trial.response.branches
        assert branch.own.sum() > 0
        assert acted.messages[0]["content"] == f"{n}+{n}?"


def test_a_server_that_died_is_started_again(options: dict[str, str]) -> None:
    async def body() -> None:
        tasks = VerifiersTasks(options)
        task = tasks.task(Split.TRAIN, 0)
        shared = {name: value for name, value in task.setup.items() if name != "task"}
        try:
            first = await server_of(shared)
            assert await server_of(shared) is first
            first.process.kill()
            await first.process.wait()
            environment = VerifiersEnvironment(task, SERVICES)
            await environment.reset()
            await environment.close()
            assert (await server_of(shared)).process.pid != first.process.pid
        finally:
            await stop_servers()

    asyncio.run(body())


def test_what_is_wrong_with_a_taskset_is_told(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"(?s)taskset nothing.*cannot be listed.*->"):
        VerifiersTasks({**options, "taskset": "nothing"}).task(Split.TRAIN, 0)
    with pytest.raises(ConfigError, match=r"(?s)29,999.*lower num_tasks"):
        VerifiersTasks(options).check_sizes(30_000, 0)
    broken = VerifiersTasks({**options, "config": '{"agent": {"harness": {"id": "nothing"}}}'})
    setup = {**VerifiersTasks(options).task(Split.TRAIN, 0).setup, "config": broken._setup["config"]}
    with pytest.raises(EnvironmentFaultError, match=r"(?s)before it served.*verbose"):
        asyncio.run(server_of({name: value for name, value in setup.items() if name != "task"}))
