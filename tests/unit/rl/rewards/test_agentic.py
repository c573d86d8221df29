"""A judge that acts sees what was left and what is hidden, and is believed only in the very form."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from k25_train.environments.base import Response, Status, Task, Verdict
from k25_train.environments.environment import Action, Tool, ToolCall
from k25_train.environments.sandboxes.base import SandboxError, SandboxSession, SandboxSpec
from k25_train.rl.rewards.agentic import AgenticJudge, read_verdict
from tests.helpers.sandboxes import needs_bubblewrap
from tests.helpers.tool_episodes import sandboxes

TASK = Task(
    key="a/1",
    family="a",
    messages=({"role": "user", "content": "Write 7 to out.txt."},),
    judge="agentic",
    reference={
        "criteria": "out.txt holds 7.",
        "files": {"check.sh": "grep -qx 7 /work/out.txt && echo fine"},
    },
)


class Scripted:
    """A model that follows a script, and keeps what it was shown."""

    def __init__(self, *actions: Action) -> None:
        self._actions = list(actions)
        self.shown: list[Mapping[str, Any]] = []

    async def __call__(self, messages: tuple[Mapping[str, Any], ...], tools: tuple[Tool, ...] = ()) -> Action:
        """The next action."""
        self.shown = list(messages)
        assert tools
        return self._actions.pop(0)


def says(text: str) -> Action:
    """A turn without calls."""
    return Action(content=text)


CHECK = Action(
    content="",
    calls=(ToolCall(id="functions.shell:0", name="shell", arguments={"command": "sh /judge/check.sh"}),),
)
PASS, FAIL = says('{"pass": true, "reason": ""}'), says('{"pass": false, "reason": "no"}')


def judged(chat: Scripted, left: str, opened: Any = None) -> Verdict:
    """The verdict on what was left as `out.txt`."""

    async def run() -> Verdict:
        found = opened or sandboxes()
        try:
            response = Response(text="Done.", num_tokens=1, ended=True, files={"out.txt": left.encode()})
            return await AgenticJudge(chat, found, 10.0).judge(TASK, response)
        finally:
            await found.close()

    return asyncio.run(run())


@needs_bubblewrap
def test_it_looks_before_it_judges() -> None:
    chat = Scripted(CHECK, PASS)
    assert judged(chat, "7\n").reward == 1.0
    assert chat.shown[-1]["content"] == "fine"
    chat = Scripted(CHECK, FAIL)
    verdict = judged(chat, "8\n")
    assert (verdict.reward, verdict.kind) == (0.0, "agentic judge")
    assert "exit status 1" in chat.shown[-1]["content"]


@needs_bubblewrap
def test_what_cannot_be_read_is_asked_for_again_and_then_no_verdict() -> None:
    assert judged(Scripted(says("It passes."), PASS), "7").reward == 1.0
    verdict = judged(Scripted(says("It passes."), says("Yes.")), "7")
    assert (verdict.status, verdict.kind) == (Status.UNSCORED, "agentic judge unreadable")
    assert judged(Scripted(*[CHECK] * 12), "7").kind == "agentic judge undecided"


class NoRoom:
    """Sandboxes of a machine that has none left."""

    async def open(self, spec: SandboxSpec) -> SandboxSession:
        """Fails."""
        raise SandboxError("no room")

    async def close(self) -> None:
        """Nothing is open."""


def test_without_a_sandbox_there_is_no_verdict() -> None:
    assert judged(Scripted(), "7", NoRoom()).status is Status.UNSCORED


@pytest.mark.parametrize(
    "text",
    ["pass", "true", '{"pass": 1, "reason": ""}', '{"pass": true}', '[["pass", true], ["reason", ""]]',
     '{"pass": true, "pass": false, "reason": ""}', '{"pass": true, "reason": ""} {"pass"', "{}", "[]"],
)  # fmt: skip
def test_nothing_else_is_a_verdict(text: str) -> None:
    assert read_verdict(text) is None
