"""Agents are commands in sandboxes without a network, which reach the gateway and nothing else."""

import asyncio
import shutil
import sys
from collections.abc import Awaitable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k25_train.environments.base import Task
from k25_train.environments.environment import EnvironmentFaultError, Observation
from k25_train.environments.sandboxes.base import SandboxLimits
from k25_train.environments.sandboxes.opening import open_sandboxes
from k25_train.errors import RolloutError
from k25_train.rollout.agents import Acted
from k25_train.rollout.gateway.agents import GatewayAgents
from k25_train.rollout.gateway.commands import filled, folders_of
from k25_train.rollout.trajectory import Ended
from tests.helpers.gateway_parts import END, Stage, call_text, gateway_stage
from tests.helpers.rollout_sections import manager_section

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
AGENT = """
import openai, os, subprocess, sys
client = openai.OpenAI()
tool = {"type": "function", "function": {"name": "shell", "parameters": {"type": "object"}}}
messages = [{"role": "user", "content": open("/task/prompt.txt").read()}]
while True:
    done = client.chat.completions.create(model=sys.argv[1], messages=messages, tools=[tool], temperature=0)
    message = done.choices[0].message
    messages.append(message.model_dump(exclude_none=True))
    if not message.tool_calls:
        break
    told = subprocess.run(["sh", "-c", "echo 7 > made; cat made"], capture_output=True, text=True).stdout
    messages.append({"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": told})
"""
LIMITS = SandboxLimits(
    cpus=1.0, memory_bytes=2**30, disk_bytes=2**26, processes=64, output_bytes=2**20, ttl_s=600
)
OPENING = Observation(messages=({"role": "user", "content": "What is in {model}?"},))


class PlainScope:
    """What agents need of a scope."""

    async def teardown(self, closing: Awaitable[None], what: str) -> None:
        await closing


def says(prompt: str) -> str:
    """A command first, then what it printed."""
    return f"It is 7.{END}" if "Return of functions.shell:0\n7" in prompt else call_text("shell", "{}")


def act(
    folder: Path, command: tuple[str, ...], says: Any = says, fails: bool = False
) -> tuple[Acted, Stage, Any]:
    """Have an agent act."""

    async def acted() -> tuple[Acted, Stage, Any]:
        async with gateway_stage(folder, says) as stage, asyncio.timeout(60):
            stage.engine.fails = fails
            trial = stage.open()
            boxes = open_sandboxes("bubblewrap", LIMITS, run="test", most=2, secret=())
            agents = GatewayAgents(stage.prompts, boxes, manager_section(), stage.counts.append)
            task = Task(key="task 7", family="f", messages=OPENING.messages, judge="j", agent=command)
            recorded: Any = trial.recorded
            nothing: Any = SimpleNamespace()
            scope: Any = PlainScope()
            try:
                found = await agents.act(task, nothing, OPENING, recorded, scope)
                assert stage.mismatches([trial]) == []
                return found, stage, trial
            finally:
                await agents.close()
                await boxes.close()

    return asyncio.run(acted())


@needs_bubblewrap
def test_an_agent_acts_through_the_gateway(tmp_path: Path) -> None:
    command = (sys.executable, "-c", AGENT, "{model}")
    acted, stage, trial = act(tmp_path, command)
    assert acted.ended is Ended.STOP
    assert [message["role"] for message in acted.messages] == ["user", "assistant", "tool", "assistant"]
    assert acted.messages[0]["content"] == "What is in {model}?"
    assert acted.messages[-1]["content"] == "It is 7."
    assert len(trial.response.branches) == 1
    assert trial.response.num_turns == 2
    assert {"gateway/turns", "gateway/ignored/temperature", "agent/status_0"} <= set(stage.counts)


@needs_bubblewrap
def test_an_agent_that_never_asks_is_no_fault_of_the_policy(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFaultError, match=r"no turn.*status 3.*no such thing"):
        act(tmp_path, ("sh", "-c", "echo no such thing >&2; exit 3"))


@needs_bubblewrap
def test_without_an_engine_the_rollout_fails_and_not_the_agent(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match="given up after 2 tries"):
        act(tmp_path, (sys.executable, "-c", AGENT, "policy"), fails=True)


@needs_bubblewrap
def test_an_agent_reaches_nothing_but_the_gateway(tmp_path: Path) -> None:
    probe = (
        "import os, socket, urllib.request\n"
        "try: socket.create_connection(('10.0.0.1', 80), 1)\n"
        "except OSError: print('no network')\n"
        "url = os.environ['OPENAI_BASE_URL'] + '/models'\n"
        "print(urllib.request.urlopen(url).status)\n"
    )
    with pytest.raises(EnvironmentFaultError, match=r"status 0.*no network\n200"):
        act(tmp_path, (sys.executable, "-c", probe))


def test_words_of_commands_are_filled_once() -> None:
    assert filled(["a", "{model}", "-t={prompt}"], OPENING) == ["a", "policy", "-t=What is in {model}?"]


def test_a_virtual_environment_comes_with_its_python(tmp_path: Path) -> None:
    python = tmp_path / "python/bin"
    program = tmp_path / "venv/bin/agent"
    for each in (python, program.parent):
        each.mkdir(parents=True)
    program.touch()
    (tmp_path / "venv/pyvenv.cfg").write_text(f"home = {python}\nversion = 3.12\n")
    assert set(folders_of([str(program)])) == {str(tmp_path / "venv"), str(tmp_path / "python")}
    assert folders_of(["agent"]) == {}
