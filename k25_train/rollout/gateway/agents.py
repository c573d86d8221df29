"""Agents of any make act as the policy: an attempt is a command in a sandbox that reaches the gateway alone.

Episode ─► reset ─► sandbox ── command ──► gateway (this loop) ─► Session ─► engines
                       │  no network: the gateway's port is on its loopback
                       └─ ends ─► files and conversation ─► judge
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import NamedTuple

from aiohttp import web

from k25_train.config.rollout_manager import ManagerConfig
from k25_train.environments.base import Task
from k25_train.environments.environment import (
    Driven,
    Endpoint,
    Environment,
    EnvironmentFaultError,
    Observation,
)
from k25_train.environments.sandboxes.base import (
    KILL_ALL,
    Ending,
    Finished,
    Sandboxes,
    SandboxSession,
    SandboxSpec,
)
from k25_train.rollout.agents import Acted
from k25_train.rollout.gateway.commands import MODEL, files_of, filled, folders_of, variables_of
from k25_train.rollout.gateway.recording import recorder_of
from k25_train.rollout.gateway.registry import Access, Registry
from k25_train.rollout.gateway.server import run_gateway
from k25_train.rollout.gateway.sessions import AgentSession, SessionRules
from k25_train.rollout.manager.scope import Scope
from k25_train.rollout.prompts import Prompting
from k25_train.rollout.session import Session
from k25_train.rollout.trajectory import Ended

LOOPBACK = ("127.0.0.1", "localhost")
LEFT_BYTES = 64 * 2**20
"""Most bytes of files that are handed to judges, names included: with more, a response has failed."""
LEAVING_S = 30.0
"""Seconds at the end of an attempt that its agent does not get, in which what it has left is read: at most a
tenth of the attempt. Our choice."""
KILL_S = 10.0
"""Seconds that it may take to end what an agent has left running. Our choice."""
SHORTEST_S = 0.1
"""Seconds that a command gets even if its sandbox has come too late. Our choice."""
SHOWN = 2_000
"""Characters of an agent's errors that a message shows: the last ones."""


class _Done(NamedTuple):
    """How an agent's command ended, and what it has left."""

    finished: Finished
    files: Mapping[str, bytes]
    cause: str
    """Why there are no files, though it has left some."""


class GatewayAgents:
    """See `Agents`. The gateway starts with the first agent."""

    def __init__(
        self,
        prompts: Prompting,
        sandboxes: Sandboxes,
        manager: ManagerConfig,
        count: Callable[[str], None],
        *,
        shards: int = 1,
    ) -> None:
        """
        Args:
            prompts: between messages and ids.
            sandboxes: in which commands run.
            manager: where the gateway listens, and limits.
            count: told what has happened, by kind.
            shards: event loops whose gateways share the ports from the configured one on.
        """
        self._prompts, self._sandboxes, self._manager, self._count = prompts, sandboxes, manager, count
        self._num_ports = shards if manager.gateway_port else 1
        self._registry = Registry()
        self._starting = asyncio.Lock()
        self._runner: web.AppRunner | None = None
        self._url = ""

    async def act(
        self, task: Task, environment: Environment, opening: Observation, session: Session, scope: Scope
    ) -> Acted:
        """See `Agents`. Raises `RolloutError` and `EngineError` as `Session.turn`, too."""
        until = self._until()
        url = await self._serving()
        most = min(self._manager.max_turns, task.max_turns or self._manager.max_turns)
        rules = SessionRules(thinking=task.thinking, max_turns=most)
        agent = AgentSession(recorder_of(session, self._prompts), rules)
        access = self._registry.admit(agent)
        try:
            if isinstance(environment, Driven):
                done = _Done(await _driven(environment, url, access, agent, until), {}, "")
            else:
                done = await self._run(task, opening, url, access, scope, until)
        finally:
            # Whatever ends it: nobody asks for this response any more.
            await self._registry.close(access)
            for kind, number in agent.counts.items():
                for _ in range(number):
                    self._count(f"gateway/{kind}")
        finished = done.finished
        if agent.fault is not None:
            raise agent.fault
        is_late = finished.ending is Ending.OUT_OF_TIME and agent.has_asked
        if not agent.counts["turns"] and not is_late:
            errors = (finished.stderr or finished.stdout).decode("utf-8", "replace").strip()[-SHOWN:]
            raise EnvironmentFaultError(
                f"agent {task.agent[0]} has asked for no turn, and ended with status {finished.status} "
                f"({finished.ending}): {errors or 'it printed nothing'}"
            )
        self._count(f"agent/status_{finished.status}")
        return Acted(
            ended=_why(finished, agent),
            messages=agent.conversation or tuple(dict(each) for each in opening.messages),
            files=done.files,
            cause=done.cause,
        )

    async def close(self) -> None:
        """End the gateway, and all sessions. Twice is as once."""
        await self._registry.close_all()
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _serving(self) -> str:
        """The gateway's URL, once it serves. Raises `RolloutError` if all its ports are taken."""
        async with self._starting:
            if self._runner is None:
                host, first = self._manager.gateway_host, self._manager.gateway_port
                ports = range(first, first + self._num_ports)
                self._runner, self._url = await run_gateway(self._registry, host, ports)
            return self._url

    def _until(self) -> float:
        """When an agent that begins now is over, on the loop's clock: before its attempt is, which would take
        the conversation and the files with it."""
        limit_s = self._manager.rollout_timeout_s
        return asyncio.get_running_loop().time() + limit_s - min(LEAVING_S, limit_s / 10)

    async def _run(
        self, task: Task, opening: Observation, url: str, access: Access, scope: Scope, until: float
    ) -> _Done:
        is_local = self._manager.gateway_host in LOOPBACK
        spec = SandboxSpec(
            name=task.key,
            files=files_of(opening),
            folders=folders_of(task.agent),
            # On another machine it is reached through the network, or not at all.
            ports=(int(url.rpartition(":")[2]),) if is_local else (),
            network=not is_local,
        )
        box = await self._sandboxes.open(spec)
        try:
            finished = await box.run(
                filled(task.agent, opening),
                # A sandbox may have been waited for.
                timeout_s=max(until - asyncio.get_running_loop().time(), SHORTEST_S),
                variables=variables_of(url, access),
            )
            return _Done(finished, *await _left(box))
        finally:
            await scope.teardown(box.close(), f"sandbox of agent {task.agent[0]}")


async def _left(box: SandboxSession) -> tuple[Mapping[str, bytes], str]:
    """What is in a sandbox, and why not. Raises `SandboxError` as it does."""
    # What still runs could change files while they are read.
    await box.run(KILL_ALL, timeout_s=KILL_S)
    try:
        return await box.snapshot(LEFT_BYTES), ""
    except ValueError as error:
        return {}, f"too much left: {error}"


async def _driven(
    environment: Driven, url: str, access: Access, agent: AgentSession, until: float
) -> Finished:
    """Have an environment's own agents act. Raises `EnvironmentFaultError` where they fail otherwise than for
    want of room, turns or time."""
    base_url = f"{url}/sessions/{access.session_id}/v1"
    ending, status = Ending.EXITED, 0
    try:
        async with asyncio.timeout_at(until) as limit:
            await environment.drive(Endpoint(base_url=base_url, key=access.key, model=MODEL))
    except EnvironmentFaultError:
        if not agent.counts["refused/overflow"]:
            raise
        status = 1
    except TimeoutError:
        if not limit.expired():
            raise
        ending, status = Ending.OUT_OF_TIME, 1
    return Finished(ending=ending, status=status, stdout=b"", stderr=b"")


def _why(finished: Finished, agent: AgentSession) -> Ended:
    """Why there are no more turns."""
    if finished.ending is Ending.OUT_OF_TIME:
        return Ended.TIMEOUT
    if agent.has_no_turns_left:
        return Ended.TURNS
    return Ended.LENGTH if finished.status and agent.counts["refused/overflow"] else Ended.STOP
