"""Runs the command lines of other programs that have sandboxes: podman, docker, kubectl, apptainer.

Every call has a limit of time, what it prints has a limit of bytes, and a call that is given up is killed.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from k25_train.environments.sandboxes.base import SandboxError

_KILL_S = 5.0
"""Seconds that a program that was killed has to be gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Called:
    """What became of a call."""

    status: int
    """Exit status, negative for a signal."""
    stdout: bytes
    """What it printed, as far as it may."""
    stderr: bytes
    """The same of its errors."""
    is_too_much: bool = False
    """Whether it was killed as it printed more."""


async def call(
    command: Sequence[str], *, timeout_s: float, stdin: bytes = b"", most: int = 1 << 20
) -> Called:
    """Run a program to its end.

    Args:
        command: program and arguments.
        timeout_s: seconds until it is killed.
        stdin: its input.
        most: bytes that it may print, output and errors together.

    Raises TimeoutError, SandboxError if it cannot be started.
    """
    room = most
    pieces: tuple[list[bytes], list[bytes]] = ([], [])
    is_too_much = False

    async def take(reader: asyncio.StreamReader, number: int) -> None:
        nonlocal room
        while piece := await reader.read(1 << 16):
            pieces[number].append(piece[: max(0, room)])
            room -= len(piece)
            if room < 0:
                raise _TooMuchError

    # Streams of our own: asyncio's would be waited for as long as anybody holds their other ends.
    with contextlib.ExitStack() as streams:
        process, readers = await _started(command, streams)
        try:
            async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as tasks:
                tasks.create_task(_feed(process, stdin))
                for number, reader in enumerate(readers):
                    tasks.create_task(take(reader, number))
                tasks.create_task(process.wait())
        except* _TooMuchError:
            is_too_much = True
        finally:
            kill_all(process)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _KILL_S)
    status = -signal.SIGKILL if process.returncode is None else process.returncode
    out, err = (b"".join(each) for each in pieces)
    return Called(status=status, stdout=out, stderr=err, is_too_much=is_too_much)


class _TooMuchError(Exception):
    """It has printed more than it may."""


async def _started(
    command: Sequence[str], streams: contextlib.ExitStack
) -> tuple[asyncio.subprocess.Process, list[asyncio.StreamReader]]:
    """A program and what it prints, which is closed with `streams`."""
    loop = asyncio.get_running_loop()
    readers, ends = [], []
    with contextlib.ExitStack() as start:
        for _ in range(2):
            ours, theirs = os.pipe()
            start.callback(os.close, theirs)
            reader = asyncio.StreamReader()
            pipe = os.fdopen(ours, "rb", buffering=0)
            transport, _ = await loop.connect_read_pipe(
                lambda reader=reader: asyncio.StreamReaderProtocol(reader),  # type: ignore[misc]
                pipe,
            )
            streams.callback(transport.close)
            readers.append(reader)
            ends.append(theirs)
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=ends[0],
                stderr=ends[1],
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"{command[0]} cannot be started: {error}") from error
    return process, readers


async def checked(command: Sequence[str], *, timeout_s: float, stdin: bytes = b"") -> bytes:
    """What a program prints. Raises SandboxError with what it says if it fails or takes too long."""
    try:
        done = await call(command, timeout_s=timeout_s, stdin=stdin)
    except TimeoutError as error:
        raise SandboxError(f"{command[0]} {command[1]} did not end in {timeout_s:g} s") from error
    if done.status:
        said = done.stderr.decode(errors="replace").strip()[-400:] or "nothing"
        raise SandboxError(f"{command[0]} {command[1]} failed with {done.status}; it said: {said}")
    return done.stdout


def kill_all(process: asyncio.subprocess.Process) -> None:
    """Kill a program that leads a session, and what it has started there."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


async def _feed(process: asyncio.subprocess.Process, stdin: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(stdin)
        await process.stdin.drain()
    except OSError:
        return
    finally:
        process.stdin.close()
