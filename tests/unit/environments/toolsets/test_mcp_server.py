"""Tools of a real server of the Model Context Protocol, in a process and over HTTP."""

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k25_train.environments.environment import EnvironmentFaultError, Services
from k25_train.environments.toolsets.base import Place, Tools
from k25_train.environments.toolsets.registry import make_toolset
from k25_train.errors import ConfigError
from tests.helpers.tool_episodes import NoJudges

pytest.importorskip("mcp")
SERVER = """
import io, sys
from mcp.server.mcpserver import Image, MCPServer
server = MCPServer("twin")
count = 0

@server.tool()
def add(a: int, b: int) -> int:
    "Add two numbers."
    global count
    count += 1
    return a + b + (0 if len(sys.argv) > 1 else 100 * count)

@server.tool()
def fail() -> str:
    raise ValueError("of no use")

@server.tool()
def picture() -> Image:
    from PIL import Image as Pillow
    out = io.BytesIO()
    Pillow.new("RGB", (30, 30), "red").save(out, "PNG")
    return Image(data=out.getvalue(), format="png")

if len(sys.argv) > 1:
    server.run(transport="streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
else:
    server.run(transport="stdio")
"""


def place() -> Place:
    """Where tools are opened."""
    services = Services(sandboxes=None, judging=NoJudges(), tool_timeout_s=10.0)  # type: ignore[arg-type]
    return Place(task="mcp/1", sandbox=None, services=services)


async def uses(tools: Tools) -> list[Any]:
    """Results of a few calls."""
    added = [await tools.call("add", {"a": 1, "b": each}) for each in (2, 3)]
    failed, shown = await tools.call("fail", {}), await tools.call("picture", {})
    assert failed.is_error
    assert len(shown.media) == 1 and shown.media[0].startswith(b"\x89PNG")
    return [each.text for each in added]


def test_a_process_is_kept_for_an_attempt(tmp_path: Path) -> None:
    path = tmp_path / "server.py"
    path.write_text(SERVER, encoding="utf-8")
    toolset = make_toolset("mcp", {"command": [sys.executable, str(path)], "tools": ["add"]})

    async def run() -> list[Any]:
        tools = await toolset.open(place())
        try:
            assert [each["function"]["name"] for each in tools.declarations] == ["add"]
            assert tools.declarations[0]["function"]["parameters"]["required"] == ["a", "b"]
            # Closed by another task than the one that has opened it, as environments are.
            return await asyncio.create_task(uses(tools))
        finally:
            await asyncio.create_task(tools.close())
            await tools.close()

    assert asyncio.run(run()) == ["103", "204"]


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Of a server over HTTP."""
    path = tmp_path / "server.py"
    path.write_text(SERVER, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(path), str(port)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.kill()
        process.wait()


def test_calls_over_http_need_no_session(url: str) -> None:
    toolset = make_toolset("mcp", {"url": url})

    async def run() -> None:
        opened = await asyncio.gather(*(toolset.open(place()) for _ in range(8)))
        assert await uses(opened[0]) == ["3", "4"]
        results = await asyncio.gather(*(tools.call("add", {"a": 1, "b": 1}) for tools in opened))
        assert [each.text for each in results] == ["2"] * 8

    asyncio.run(run())


def test_a_server_that_is_not_there_is_a_fault_by_its_name() -> None:
    for options in ({"url": "http://127.0.0.1:9/mcp"}, {"command": ["/no/such/server"]}):
        with pytest.raises(EnvironmentFaultError, match=r"mcp/1: (http://127.0.0.1:9/mcp|/no/such/server): "):
            asyncio.run(make_toolset("mcp", options).open(place()))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="url and command"):
        make_toolset("mcp", {})
