"""The environment `tools`: toolsets by name, a sandbox if one of them needs it, a judge of what was left.

    reset ─► sandbox with the task's files ─► toolsets opened ─► prompt
    step  ─► each call: known? arguments as declared? ─► tool ─► result, cut, and its images
    judge ─► all that runs is killed ─► files of /work ─► sandbox closed ─► judge, elsewhere

A call that is wrong, fails or takes too long is told to the policy. `SandboxError` and
`EnvironmentFaultError` have the attempt start over. Source: K2.5, section 4.4; details are our choice.
"""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from k25_train.environments.base import Response, Status, Task, Verdict, failed
from k25_train.environments.environment import (
    Action,
    EnvironmentFaultError,
    Observation,
    Services,
    Tool,
    ToolCall,
)
from k25_train.environments.hack_signs import hack_signs
from k25_train.environments.sandboxes.base import KILL_ALL, Ending, SandboxSession, SandboxSpec
from k25_train.environments.shown_tools import ShownTools
from k25_train.environments.tool_setup import read_setup
from k25_train.environments.toolsets.base import Place, ToolResult, Tools, wrong
from k25_train.environments.toolsets.images import as_shown
from k25_train.environments.toolsets.schema import faults

MAX_CALLS = 16
"""Calls of one turn that are made; those behind are told that they were not. Our choice."""
MAX_IMAGES = 8
"""Images of one turn that are shown. Our choice."""
GRACE_S = 20.0
"""Seconds beyond its limit that a tool gets to keep it itself, which costs less than being cancelled."""
PREPARE_S = 120.0
"""Seconds for each command that prepares a sandbox. Our choice."""
FORGET_HISTORY = """
find /work -maxdepth 8 -name .git -prune -exec sh -ec '
for repository; do
    cd "$repository/.."
    branch=$(git symbolic-ref --short -q HEAD || echo main)
    rm -rf .git
    git init -q -b "$branch"
    git add -A
    git -c user.name=task -c user.email=task@localhost commit -q --allow-empty -m start
done' sh {} +
"""
"""Leaves every repository with one commit, of what is there: a history, a stash or another branch may hold
the answer."""


class ToolEnvironment:
    """See `Environment`."""

    def __init__(
        self, task: Task, services: Services, hidden: Mapping[str, bytes] = MappingProxyType({})
    ) -> None:
        """Raises ConfigError for a setup that is not right.

        Args:
            task: what is asked.
            services: what may be used.
            hidden: absolute path -> content, read-only in the sandbox: a judge's, which no policy gets.
        """
        self._hidden = hidden
        self._task, self._services = task, services
        self._setup = read_setup(task)
        self._opened = AsyncExitStack()
        self._session: SandboxSession | None = None
        self._shown = ShownTools((), {})
        self._num_calls = 0
        """Calls of tools that were made."""
        self._owners: dict[str, Tools] = {}
        """Name of a tool -> toolset that has it."""
        self._left: Mapping[str, bytes] | str | None = None
        """What the policy has left, or why that cannot be had; None before it has gone."""

    @property
    def tools(self) -> tuple[Tool, ...]:
        """What the toolsets declare, under the names that the task gives them."""
        return self._shown.declarations

    @property
    def is_replayable(self) -> bool:
        """Whether all toolsets are, without a sandbox."""
        return not self._setup.needs_sandbox and all(
            each.is_replayable for each in self._setup.toolsets.values()
        )

    async def reset(self) -> Observation:
        """Open the sandbox and the toolsets; the task's own prompt."""
        setup, task = self._setup, self._task
        # 1. The sandbox, and what is done in it before the policy comes.
        if setup.needs_sandbox:
            system = {
                path: each for toolset in setup.toolsets.values() for path, each in toolset.files.items()
            }
            spec = SandboxSpec(
                name=task.key, files={**setup.files, **system, **self._hidden}, network=setup.network
            )
            self._session = await self._services.sandboxes.open(spec)
            self._opened.push_async_callback(self._session.close)
            for command in (*setup.prepare, *([FORGET_HISTORY] if setup.forgets_history else ())):
                await self._prepare(self._session, command)

        # 2. Tools.
        place = Place(
            task=task.key,
            sandbox=self._session,
            services=self._services,
            has_acted=lambda: self._num_calls > 0,
        )
        declared: list[Tool] = []
        for name, toolset in setup.toolsets.items():
            tools = await toolset.open(place)
            self._opened.push_async_callback(tools.close)
            for each in tools.declarations:
                if each["function"]["name"] in self._owners:
                    raise EnvironmentFaultError(
                        f"{task.key}: two toolsets have a tool {each['function']['name']}, {name} is one"
                    )
                self._owners[each["function"]["name"]] = tools
                declared.append(each)
        self._shown = ShownTools(tuple(declared), setup.tools)
        return Observation(messages=task.messages, media=task.media)

    async def _prepare(self, session: SandboxSession, command: str) -> None:
        done = await session.run(["/bin/sh", "-c", command], timeout_s=PREPARE_S)
        if done.ending is not Ending.EXITED or done.status:
            said = (done.stderr or done.stdout).decode(errors="replace").strip()[-300:]
            raise EnvironmentFaultError(
                f"{self._task.key}: preparing its sandbox failed ({done.ending}, status {done.status}): "
                f"{command[:80]}: {said}"
            )

    async def step(self, action: Action) -> Observation:
        """Make the calls, one after another; without any the policy is done."""
        if action.fault:
            said = {"role": "user", "content": f"Your turn cannot be read: {action.fault}."}
            return Observation(messages=(said,))
        if not action.calls:
            return Observation(done=True)
        messages: list[Mapping[str, Any]] = []
        media: list[bytes] = []
        for number, call in enumerate(action.calls):
            if number < MAX_CALLS:
                result = await self._called(call)
            else:
                result = wrong(f"not called: at most {MAX_CALLS} calls a turn are made")
            message, images = await self._told(call, result, MAX_IMAGES - len(media))
            messages.append(message)
            media += images
        return Observation(messages=tuple(messages), media=tuple(media))

    async def _called(self, call: ToolCall) -> ToolResult:
        """The result of a call, whatever is wrong with it."""
        known = self._shown.known(call)
        if known is None:
            names = ", ".join(each["function"]["name"] for each in self.tools) or "none"
            return wrong(f"there is no tool {call.name}; there is {names}")
        if found := list(faults(dict(call.arguments), known.schema)):
            return wrong(f"not called: {'; '.join(found[:5])}")
        limit_s = self._services.tool_timeout_s
        try:
            async with asyncio.timeout(limit_s + GRACE_S):
                return await self._owners[known.name].call(known.name, known.arguments)
        except TimeoutError:
            return wrong(f"[{call.name} took longer than {limit_s:g} s and was given up]")
        finally:
            self._num_calls += 1

    async def _told(
        self, call: ToolCall, result: ToolResult, room: int
    ) -> tuple[Mapping[str, Any], list[bytes]]:
        """The message with a result, and the images that it shows."""
        text = cut(result.text, self._setup.result_bytes)
        images: list[bytes] = []
        for number, each in enumerate(result.media, 1):
            if len(images) == room:
                text += f"\n[further images are left out: a turn shows {MAX_IMAGES}]"
                break
            try:
                images.append(await asyncio.to_thread(as_shown, each))
            except ValueError as error:
                text += f"\n[image {number} is not shown: it {error}]"
        message: dict[str, Any] = {"role": "tool", "tool_call_id": call.id, "content": text}
        if images:
            parts = [{"type": "image", "image": str(number)} for number in range(len(images))]
            message["content"] = [{"type": "text", "text": text}, *parts]
        return message, images

    async def judge(self, response: Response) -> Verdict:
        """Have everything ended, and the files that are left then judged, elsewhere. Asked again, it judges
        the same files."""
        if self._left is None:
            self._left = await self._leave()
            await self.close()
        if isinstance(self._left, str):
            return self._counted(failed(self._left), response, {})
        if not self._task.agent:
            # An agent has had a sandbox of its own, and left its files there.
            response = replace(response, files=self._left)
        verdict = await self._services.judging.judge(self._task, response)
        return self._counted(verdict, response, response.files)

    def _counted(self, verdict: Verdict, response: Response, files: Mapping[str, bytes]) -> Verdict:
        """The verdict with the signs of a hack among its parts; whatever they are, the reward is the same."""
        if verdict.status is Status.UNSCORED:
            return verdict
        signs = hack_signs(response.messages, files, response.text)
        return replace(verdict, parts={**verdict.parts, **{f"hack/{sign}": 1.0 for sign in signs}})

    async def _leave(self) -> Mapping[str, bytes] | str:
        session = self._session
        files: Mapping[str, bytes] | str = {}
        if session is not None:
            # What still runs could change files while they are read.
            await session.run(KILL_ALL, timeout_s=PREPARE_S)
            try:
                files = await session.snapshot(self._setup.left_bytes)
            except ValueError as error:
                files = f"too much left: {error}"
        return files

    async def close(self) -> None:
        """Close toolsets and sandbox."""
        self._session = None
        opened, self._opened = self._opened, AsyncExitStack()
        await opened.aclose()


def cut(text: str, max_bytes: int) -> str:
    """A text of at most so many bytes in UTF-8 and a note: the middle of a longer one is left out."""
    if len(text) * 4 <= max_bytes:
        return text
    content = text.encode(errors="replace")
    if len(content) <= max_bytes:
        return text
    half = max_bytes // 2
    first, last = (part.decode(errors="ignore") for part in (content[:half], content[-half:]))
    return f"{first}\n[{len(content) - 2 * half} bytes left out]\n{last}"
