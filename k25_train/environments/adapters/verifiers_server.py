"""Processes of the Python that has verifiers: one that lists tasks, one that serves them, shared by attempts.

A server ends with the process that started it, whatever ends that: its input is a pipe, which is then closed.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k25_train.environments.environment import EnvironmentFaultError
from k25_train.errors import ConfigError

SCRIPT = Path(__file__).with_name("verifiers_process.py")
"""To be run with `-P`: next to it lies a `verifiers.py` of ours."""
LIST_S = 300.0
"""Seconds in which tasks are listed: tasksets may download. Our choice."""
START_S = 180.0
"""Seconds in which a server starts: its imports alone take ten. Our choice."""
_SERVERS: dict[tuple[int, str], "asyncio.Task[Server]"] = {}
"""Event loop and what is served -> server."""


class Server:
    """A server that runs."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process, self.address = process, address

    @property
    def is_alive(self) -> bool:
        """Whether its process has not ended."""
        return self.process.returncode is None


def list_tasks(setup: Mapping[str, Any], limit: int) -> list[Mapping[str, Any]]:
    """Tasks of a taskset: `key` and `data` (verifiers' dumped `TaskData`). Raises ConfigError."""
    command = [setup["python"], "-P", str(SCRIPT), "tasks", json.dumps(setup["config"]), str(limit)]
    name = f"verifiers taskset {setup['config']['taskset']['id']}"
    try:
        done = subprocess.run(
            command, env=_variables(setup), capture_output=True, timeout=LIST_S, check=False
        )
    except OSError as error:
        raise ConfigError(
            f"{name}: options.python={setup['python']} cannot be started: {error}\n"
            "  -> `uv venv V && uv pip install -p V/bin/python verifiers==0.4.0`, then python: V/bin/python"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{name}: not listed within {LIST_S:g} s\n  -> see what its load() does") from error
    if done.returncode:
        raise ConfigError(f"{name}: cannot be listed: {_last(done.stderr)}\n  -> {_remedy(setup)}")
    try:
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        return [{"key": str(each["key"]), "data": dict(each["data"])} for each in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{name}: its list is no JSON lines ({error})\n  -> its load() must not print"
        ) from error


async def server_of(setup: Mapping[str, Any]) -> Server:
    """The server of this event loop for a setup, started if there is none that lives.

    Raises EnvironmentFaultError if it cannot be started.
    """
    key = (id(asyncio.get_running_loop()), json.dumps(setup, sort_keys=True, default=str))
    starting = _SERVERS.get(key)
    if starting is None or (starting.done() and not _lives(starting)):
        starting = _SERVERS[key] = asyncio.create_task(_started(setup))
    return await asyncio.shield(starting)


async def stop_servers() -> None:
    """End the servers of this event loop, as where its run ends; they would end with the process."""
    loop = id(asyncio.get_running_loop())
    for key in [each for each in _SERVERS if each[0] == loop]:
        starting = _SERVERS.pop(key)
        if _lives(starting):
            await _stop(starting.result().process)
        else:
            # One that is being started ends what it has started.
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)


def _lives(starting: "asyncio.Task[Server]") -> bool:
    return (
        starting.done()
        and not starting.cancelled()
        and not starting.exception()
        and starting.result().is_alive
    )


async def _started(setup: Mapping[str, Any]) -> Server:
    words = [setup["python"], "-P", str(SCRIPT), "serve", json.dumps(setup["config"])]
    name = f"verifiers server of {setup['config']['taskset']['id']}"
    try:
        process = await asyncio.create_subprocess_exec(
            *words,
            str(setup["workers"]),
            str(setup["most"]),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=sys.stderr.fileno() if setup["verbose"] else asyncio.subprocess.DEVNULL,
            env=_variables(setup),
        )
    except OSError as error:
        raise EnvironmentFaultError(f"{name}: cannot be started: {error}\n  -> {_remedy(setup)}") from error
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_S):
            line = await process.stdout.readline()
        return Server(process, str(json.loads(line)["address"]))
    except (TimeoutError, ValueError, KeyError, TypeError) as error:
        await _stop(process)
        raise EnvironmentFaultError(
            f"{name}: it has ended with status {process.returncode} before it served\n"
            f"  -> set options.verbose: 'true' to see why; {_remedy(setup)}"
        ) from error
    except asyncio.CancelledError:
        await _stop(process)
        raise


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), 10)
    except TimeoutError:
        process.kill()
        await process.wait()


def _variables(setup: Mapping[str, Any]) -> dict[str, str]:
    """Its environment: harnesses need `uv` on PATH, of which our Python's folder may have one."""
    path = f"{os.environ.get('PATH', os.defpath)}:{Path(sys.executable).parent}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "PATH": path, **({"PYTHONPATH": setup["path"]} if setup["path"] else {})}


def _remedy(setup: Mapping[str, Any]) -> str:
    return (
        f"install verifiers==0.4.0 and the taskset for {setup['python']}, or name its folder in options.path"
    )


def _last(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1][-400:] if lines else "it said nothing"
