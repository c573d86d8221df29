"""Harbor's task folders: the policy works in a sandbox, tests judge what it left in a fresh one.

    sandbox: environment/ ─► bash, turn by turn ─► snapshot of /work ─► closed
    fresh sandbox: snapshot without .verifier/, /tests ─► bash /tests/test.sh ─► .verifier/reward.txt

    family: harbor    options: {path: datasets/terminal-bench}

Tests reach no sandbox before the policy has left, and no reward is read from a sandbox that it was in. Images
are named (`docker_image` of task.toml, or `environment.sandbox.image`), not built.
"""

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from k25_train.environments.adapters.harbor_folder import LOGS, HarborFolder, read_folder
from k25_train.environments.adapters.messages import is_reward, refusal, result, tool
from k25_train.environments.adapters.sources import Listed, need, read_text
from k25_train.environments.base import Response, Task, Verdict, failed, scored
from k25_train.environments.environment import Action, Observation, Services, Tool, ToolCall
from k25_train.environments.family import Options, read_range, user
from k25_train.environments.sandboxes.base import KILL_ALL, Ending, Finished, SandboxSession, SandboxSpec
from k25_train.errors import ConfigError

NAME = "harbor"
BASH = tool(
    "bash",
    "Runs a command line in /work; answers with what it prints and its exit status.",
    {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
)
RESULT_CHARACTERS = 20_000
"""Of what a command prints; the middle of more is left out. Our choice."""
LEFT_BYTES = 128 << 20
"""Most bytes that the policy may leave. Our choice."""
MAX_REWARD_BYTES = 1 << 16
_REWARD = {"text": f"{LOGS}/reward.txt", "json": f"{LOGS}/reward.json"}


class HarborTasks(Listed[HarborFolder]):
    """Folders in a folder."""

    name = NAME

    def __init__(self, options: Mapping[str, str]) -> None:
        """Options: `path` (required: the folder that the tasks' folders are in), `max_turns`. Raises
        ConfigError."""
        need(NAME, options, "path", "datasets/terminal-bench")
        given = Options(NAME, options)
        self._path = Path(given.take("path", "datasets/terminal-bench", read_text, "must be a folder"))
        self._max_turns = given.take("max_turns", "50", read_range, "must be 1 or more")[-1]
        given.end()

    def rows(self) -> Sequence[HarborFolder]:
        """See `Listed`."""
        folders = sorted(path.parent for path in self._path.glob("*/task.toml"))
        if not folders:
            raise ConfigError(
                f"options.path={self._path} of the family {NAME}: no folder in it has a task.toml\n"
                "  -> name the folder that the tasks' folders are in"
            )
        return [read_folder(path) for path in folders]

    def asked(self, row: HarborFolder) -> object:
        """Its instruction."""
        return row.instruction

    def make(self, key: str, row: HarborFolder) -> Task:
        """See `Listed`."""
        return Task(
            key=f"{key}/{row.path.name}",
            family=NAME,
            messages=user(row.instruction),
            judge="",
            environment=NAME,
            setup={"path": str(row.path)},
            max_turns=self._max_turns,
            needs_sandbox=True,
            thinking=True,
        )


class HarborEnvironment:
    """See `Environment`."""

    is_replayable = False
    tools: tuple[Tool, ...] = (BASH,)

    def __init__(self, task: Task, services: Services) -> None:
        self._task, self._services = task, services
        self._folder = read_folder(Path(task.setup["path"]))
        self._session: SandboxSession | None = None
        self._seconds_left = self._folder.agent_timeout_s
        self._left: Mapping[str, bytes] | str | None = None
        """What the policy has left, or why that cannot be had; None before it has gone."""

    async def reset(self) -> Observation:
        """Open the sandbox; the instruction."""
        self._session = await self._open("", self._folder.files(), self._folder.network)
        return Observation(messages=self._task.messages)

    async def step(self, action: Action) -> Observation:
        """Run its commands, one after another; a turn without any is the last."""
        told = refusal(action, ["bash"])
        if told is not None:
            return told
        if not action.calls:
            return Observation(done=True)
        messages = tuple([await self._called(call) for call in action.calls])
        return Observation(messages=messages, done=self._seconds_left <= 0)

    async def judge(self, response: Response) -> Verdict:
        """What the tests make of what was left. Asked again, they judge the same files."""
        if self._left is None:
            self._left = await self._leave()
            await self.close()
        if isinstance(self._left, str):
            return failed(self._left)
        session = await self._open("/tests", {**self._left, **self._folder.tests()}, network=False)
        try:
            return await self._tested(session)
        finally:
            await session.close()

    async def close(self) -> None:
        """End its sandbox."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _open(self, purpose: str, files: Mapping[str, bytes], network: bool) -> SandboxSession:
        spec = SandboxSpec(
            name=self._task.key + purpose, files=files, network=network, image=self._folder.image
        )
        return await self._services.sandboxes.open(spec)

    async def _called(self, call: ToolCall) -> Mapping[str, Any]:
        assert self._session is not None, "it was reset"
        command = call.arguments.get("command")
        if not isinstance(command, str):
            return result(call, "not run: command has to be a text")
        if self._seconds_left <= 0:
            return result(call, "not run: the time for this task is over")
        limit_s = min(self._services.tool_timeout_s, self._seconds_left)
        began = time.monotonic()
        done = await self._session.run(["/bin/bash", "-c", command], timeout_s=limit_s)
        self._seconds_left -= time.monotonic() - began
        return result(call, _told(done, limit_s))

    async def _leave(self) -> Mapping[str, bytes] | str:
        assert self._session is not None, "it was reset"
        # What still runs could change files while they are read.
        await self._session.run(KILL_ALL, timeout_s=self._services.tool_timeout_s)
        try:
            files = await self._session.snapshot(LEFT_BYTES)
        except ValueError as error:
            return f"too much left: {error}"
        return {path: content for path, content in files.items() if Path(path).parts[0] != LOGS}

    async def _tested(self, session: SandboxSession) -> Verdict:
        # Tests begin with an empty folder for the reward, and it is theirs alone.
        script = f"mkdir -p {shlex.quote(LOGS)} && exec /bin/bash /tests/test.sh"
        limit_s = self._folder.verifier_timeout_s
        done = await session.run(["/bin/bash", "-c", script], timeout_s=limit_s)
        said = (done.stderr or done.stdout).decode(errors="replace").strip()[-300:]
        if done.ending is not Ending.EXITED:
            return failed(f"tests ended: {done.ending} (verifier.timeout_sec={limit_s:g}): {said}")
        for kind, path in _REWARD.items():
            try:
                content = await session.read(path, MAX_REWARD_BYTES)
            except FileNotFoundError:
                continue
            except ValueError as error:
                return failed(f"unreadable reward: {path}: {error}")
            return _verdict(kind, content)
        return failed(f"no reward: tests ended with status {done.status} and wrote none: {said}")


def _verdict(kind: str, content: bytes) -> Verdict:
    """The verdict that a file with a reward states: a number, or an object of them with a `reward`."""
    try:
        if kind == "json":
            parts = {str(name): float(each) for name, each in json.loads(content).items()}
            reward = parts["reward"]
        else:
            parts = {"tests": float(content)}
            reward = parts["tests"]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        return failed(f"unreadable reward: {content[:80]!r}: {type(error).__name__}: {error}")
    if not all(map(is_reward, parts.values())):
        return failed(f"unreadable reward: {content[:80]!r} is not finite")
    return scored(reward, parts)


def _told(done: Finished, limit_s: float) -> str:
    text = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
    if len(text) > RESULT_CHARACTERS:
        half = RESULT_CHARACTERS // 2
        text = f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"
    if done.ending is Ending.EXITED:
        return f"{text}\n[status {done.status}]" if done.status or not text.strip() else text
    how = f"{done.ending}, {limit_s:g} s" if done.ending is Ending.OUT_OF_TIME else str(done.ending)
    return f"{text}\n[{how}]"
