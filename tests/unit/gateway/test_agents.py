"""Agents are commands in sandboxes without a network, which reach the gateway and nothing else."""

import asyncio
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from k25_train.environments.base import Task
from k25_train.environments.environment import Endpoint, EnvironmentFaultError
from k25_train.environments.sandboxes.base import SandboxError, SandboxSpec
from k25_train.environments.sandboxes.folders import check_folders
from k25_train.environments.sandboxes.none import NoSandboxes
from k25_train.errors import RolloutError
from k25_train.rollout.gateway import agents
from k25_train.rollout.gateway.commands import filled, folders_of
from k25_train.rollout.trajectory import Ended
from tests.helpers.acting_agents import OPENING, PlainScope, act
from tests.helpers.gateway_parts import END, call_text, gateway_stage
from tests.helpers.rollout_sections import manager_section
from tests.helpers.sandboxes import needs_bubblewrap

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

LEAVING = """
import os, subprocess, urllib.request
url, key = os.environ["OPENAI_BASE_URL"] + "/chat/completions", os.environ["OPENAI_API_KEY"]
body = b'{"messages": [{"role": "user", "content": "Hello"}]}'
urllib.request.urlopen(urllib.request.Request(url, body, {"authorization": "Bearer " + key})).read()
os.makedirs("a")
open("a/made", "wb").write(bytes([7, 255]))
os.symlink("/task/prompt.txt", "link")
subprocess.Popen(["sh", "-c", "while :; do echo x >> late; sleep 0.01; done"])
"""


def says(prompt: str) -> str:
    """A command first, then what it printed."""
    return f"It is 7.{END}" if "Return of functions.shell:0\n7" in prompt else call_text("shell", "{}")


class Slow:
    """An environment whose agents ask once, and never end."""

    async def drive(self, endpoint: Endpoint) -> None:
        async with openai.AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.key) as client:
            await client.chat.completions.create(
                model=endpoint.model, messages=[{"role": "user", "content": "Hi"}]
            )
            await asyncio.sleep(50)


def can_show_python() -> bool:
    """Whether sandboxes may see the Python that has the SDK: not where it is in a home folder."""
    try:
        check_folders(SandboxSpec(name="test", folders=folders_of([sys.executable])), ())
    except SandboxError:
        return False
    return True


@needs_bubblewrap
@pytest.mark.skipif(not can_show_python(), reason="this Python is where no sandbox may look")
def test_an_agent_acts_through_the_gateway(tmp_path: Path) -> None:
    command = (sys.executable, "-c", AGENT, "{model}")
    acted, stage, trial = act(tmp_path, command, says)
    assert acted.ended is Ended.STOP
    assert [message["role"] for message in acted.messages] == ["user", "assistant", "tool", "assistant"]
    assert acted.messages[0]["content"] == "What is in {model}?"
    assert acted.messages[-1]["content"] == "It is 7."
    assert len(trial.response.branches) == 1
    assert trial.response.num_turns == 2
    assert {"gateway/turns", "gateway/ignored/temperature", "agent/status_0"} <= set(stage.counts)


@needs_bubblewrap
def test_what_an_agent_leaves_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Something that it left running writes on, unless it is ended first.
    command = ("python3", "-c", LEAVING)
    acted, _, _ = act(tmp_path, command, says)
    assert acted.files["a/made"] == bytes([7, 255]) and acted.cause == ""
    assert set(acted.files) <= {"a/made", "late"}, "no link"
    monkeypatch.setattr(agents, "LEFT_BYTES", 3)
    acted, _, _ = act(tmp_path, command, says)
    assert acted.files == {} and acted.cause.startswith("too much left: ")


@needs_bubblewrap
def test_an_agent_that_is_late_is_judged_by_what_it_has_said_and_left(tmp_path: Path) -> None:
    command = ("python3", "-c", LEAVING + "import time; time.sleep(50)")
    acted, _, _ = act(tmp_path, command, says, limit_s=8)
    assert acted.ended is Ended.TIMEOUT
    assert [message["role"] for message in acted.messages] == ["user", "assistant"]
    assert acted.files["a/made"] == bytes([7, 255])


def test_an_environment_whose_agents_are_late_keeps_their_conversation(tmp_path: Path) -> None:
    async def body() -> None:
        async with gateway_stage(tmp_path, says) as stage, asyncio.timeout(60):
            section = replace(manager_section(), rollout_timeout_s=2)
            gateway = agents.GatewayAgents(stage.prompts, NoSandboxes(), section, stage.counts.append)
            recorded: Any = stage.open().recorded
            scope: Any = PlainScope()
            task = Task(key="task 7", family="f", messages=OPENING.messages, judge="j", agent=("slow",))
            try:
                async with asyncio.timeout(2):
                    acted = await gateway.act(task, Slow(), OPENING, recorded, scope)
            finally:
                await gateway.close()
            assert acted.ended is Ended.TIMEOUT
            assert [message["role"] for message in acted.messages] == ["user", "assistant"]

    asyncio.run(body())


@needs_bubblewrap
def test_an_agent_that_never_asks_is_no_fault_of_the_policy(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFaultError, match=r"no turn.*status 3.*no such thing"):
        act(tmp_path, ("sh", "-c", "echo no such thing >&2; exit 3"), says)


@needs_bubblewrap
def test_without_an_engine_the_rollout_fails_and_not_the_agent(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match="given up after 2 tries"):
        act(tmp_path, ("python3", "-c", LEAVING), says, fails=True)


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
        act(tmp_path, ("python3", "-c", probe), says)


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
