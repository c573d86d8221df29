"""The toolset `mcp`: the tools of any server that speaks the Model Context Protocol.

    {"url": "http://tools:8000/mcp"}                          streamable HTTP: a connection for each call
    {"command": ["my-server", "--stdio"], "variables": {}}    a process for each attempt

Over HTTP nothing is kept between calls, so that hundreds of attempts that begin at once hold no sessions
(long-lived ones broke under that). `tools` names those that are shown; all without. `replayable` says that
equal calls give equal results. Servers are the operator's: they run outside of sandboxes. Needs the package
mcp (extra `agents`).
"""

import asyncio
import base64
import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from k25_train.environments.environment import EnvironmentFaultError, Tool
from k25_train.environments.toolsets.base import Place, ToolResult
from k25_train.environments.toolsets.options import ToolOptions
from k25_train.errors import ConfigError, MachineError

if TYPE_CHECKING:
    from mcp import Client

START_S = 60.0
"""Seconds in which a server has to answer first. Our choice."""
MAX_IN_USE = 64
"""Connections over HTTP at once in this process; further calls wait. Our choice."""
_REMEDY = "is the server that the toolset names up, and does it speak the protocol?"


class Mcp:
    """See `Toolset`."""

    declarations: tuple[Tool, ...] = ()
    needs_sandbox = False
    files: Mapping[str, bytes] = {}

    def __init__(self, server: Any, where: str, shown: list[str], *, is_replayable: bool) -> None:
        """
        Args:
            server: what the package's client takes: a URL, or how to start a process.
            where: for messages.
            shown: tools that are; all where none is named.
            is_replayable: whether equal calls give equal results.
        """
        self._server = server
        self._where = where
        self._shown = shown
        self.is_replayable = is_replayable

    async def open(self, place: Place) -> "_OpenMcp":
        """Ask for the tools. Raises `EnvironmentFaultError` for a server that does not answer."""
        limit_s = place.services.tool_timeout_s
        link = (
            _Apart(self._server, limit_s) if isinstance(self._server, str) else _Kept(self._server, limit_s)
        )
        try:
            async with asyncio.timeout(START_S), link.client() as client:
                listed = [tool async for tool in _listed(client)]
        except Exception as error:
            await link.close()
            raise EnvironmentFaultError(f"{place.task}: {self._where}: {_text(error)}; {_REMEDY}") from error
        return _OpenMcp(link, self._where, [each for each in listed if self._is_shown(each)])

    def _is_shown(self, tool: Tool) -> bool:
        return not self._shown or tool["function"]["name"] in self._shown


class _OpenMcp:
    def __init__(self, link: "_Apart | _Kept", where: str, declarations: list[Tool]) -> None:
        self.declarations = tuple(declarations)
        self._link = link
        self._where = where

    async def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Have the server make the call. Raises `EnvironmentFaultError` for one that is gone."""
        from mcp import MCPError

        try:
            async with self._link.client() as client:
                return _told(await client.call_tool(name, dict(arguments)))
        except MCPError as error:
            # What the server says of the call, and a call that it did not answer in time.
            return ToolResult(text=f"[{name}: {error}]", is_error=True)
        except Exception as error:
            raise EnvironmentFaultError(f"{self._where}: {_text(error)}; {_REMEDY}") from error

    async def close(self) -> None:
        """End the process, if it is one."""
        await self._link.close()


class _Apart:
    """A connection for each call."""

    def __init__(self, server: str, limit_s: float) -> None:
        self._server = server
        self._limit_s = limit_s

    @asynccontextmanager
    async def client(self) -> AsyncIterator["Client"]:
        from mcp import Client

        async with _room(), Client(self._server, read_timeout_seconds=self._limit_s, cache=None) as client:
            yield client

    async def close(self) -> None:
        """Nothing is kept."""


class _Kept:
    """A process with one connection, in a task of its own: what opens it has to close it."""

    def __init__(self, server: Any, limit_s: float) -> None:
        self._server = server
        self._limit_s = limit_s
        self._ends = asyncio.Event()
        self._ready: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold())

    async def _hold(self) -> None:
        from mcp import Client

        try:
            with open(os.devnull, "w", encoding="utf-8") as nowhere:
                from mcp.client.stdio import stdio_client

                transport = stdio_client(self._server, errlog=nowhere)
                async with Client(transport, read_timeout_seconds=self._limit_s) as client:
                    self._ready.set_result(client)
                    await self._ends.wait()
        except BaseException as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error if isinstance(error, Exception) else RuntimeError(str(error)))

    @asynccontextmanager
    async def client(self) -> AsyncIterator["Client"]:
        yield await asyncio.shield(self._ready)

    async def close(self) -> None:
        self._ends.set()
        with contextlib.suppress(Exception):
            await self._task


def _room() -> asyncio.Semaphore:
    """Of this event loop."""
    loop = asyncio.get_running_loop()
    if loop not in _ROOMS:
        _ROOMS.clear()
        _ROOMS[loop] = asyncio.Semaphore(MAX_IN_USE)
    return _ROOMS[loop]


_ROOMS: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}


async def _listed(client: "Client") -> AsyncIterator[Tool]:
    cursor: str | None = None
    while True:
        page = await client.list_tools(cursor=cursor)
        for tool in page.tools:
            function = {
                "name": tool.name,
                "description": tool.description or "",
                "parameters": tool.input_schema,
            }
            yield {"type": "function", "function": function}
        if not (cursor := page.next_cursor):
            return


def _told(result: Any) -> ToolResult:
    texts: list[str] = []
    images: list[bytes] = []
    for part in result.content:
        if part.type == "text":
            texts.append(part.text)
        elif part.type == "image":
            with contextlib.suppress(ValueError):
                images.append(base64.b64decode(part.data, validate=True))
                texts.append(f"[image {len(images)}]")
        elif part.type == "resource" and hasattr(part.resource, "text"):
            texts.append(part.resource.text)
        else:
            texts.append(f"[{part.type}]")
    return ToolResult(text="\n".join(texts) or "[no output]", media=tuple(images), is_error=result.is_error)


def _text(error: BaseException) -> str:
    """What an error says; of a group, its first one."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


def make_mcp(options: Mapping[str, Any]) -> Mcp:
    """Raises ConfigError without a server, MachineError without the package."""
    given = ToolOptions("mcp", options)
    url, command = given.take("url", str, ""), given.take("command", list, [])
    variables, shown = given.take("variables", dict, {}), given.take("tools", list, [])
    is_replayable = given.take("replayable", bool, False)
    given.end()
    if bool(url) == bool(command):
        raise ConfigError(
            "toolset mcp: it needs one of its options url and command\n  -> e.g. url: http://localhost:8000/mcp"
        )
    try:
        from mcp import StdioServerParameters
    except ImportError as error:
        raise MachineError(
            f"toolset mcp: the package mcp cannot be imported ({error})\n  -> pip install 'k25-train[agents]'"
        ) from error
    if url:
        return Mcp(url, url, shown, is_replayable=is_replayable)
    first, *rest = map(str, command)
    server = StdioServerParameters(command=first, args=rest, env={k: str(v) for k, v in variables.items()})
    return Mcp(server, first, shown, is_replayable=is_replayable)
