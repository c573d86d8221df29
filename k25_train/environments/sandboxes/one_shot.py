"""Runs code that nobody trusts: bubblewrap around it, limits of the kernel on it.

    this process ─► sh: enters the group, takes its limits ─► bwrap: namespaces ─► command
                    cgroup v1 or v2, rlimits                  no network, no capabilities,
                                                              read-only root, /work in memory

The code sees the system's libraries, Python's, and the files that it is given. It has no variable of this
process, no file of the run, no network, and writes to `/work` alone, which is gone when it ends. When this
process dies, however it does, so does the sandbox.

Needs bubblewrap. There is no way to run without it: code is refused by name rather than run unprotected.
"""

import asyncio
import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence

from k25_train.environments.sandboxes import cgroups, owners
from k25_train.environments.sandboxes.base import Ending, Finished
from k25_train.environments.sandboxes.command_line import (
    Limits,
    View,
    bubblewrap,
    exit_status,
    in_memory,
    kill,
    launcher,
    refusal_of,
    scheduled_as_others,
)
from k25_train.errors import MachineError

_KILLED = 128 + 9
_TEARDOWN_S = 60.0
"""After its time anybody may remove a sandbox once so much more has passed."""


class Sandbox:
    """Runs commands, each in a sandbox of its own."""

    def __init__(self, limits: Limits) -> None:
        """Use `open_sandbox`, which checks the machine."""
        self.limits = limits
        self.hierarchies = cgroups.hierarchies()
        """Where groups of processes are made."""
        self._owner = owners.this_process("")
        self._limits_memory = any("memory" in hierarchy.limits for hierarchy in self.hierarchies)

    async def run(
        self,
        command: Sequence[str],
        files: Mapping[str, bytes],
        stdin: bytes = b"",
        descriptors: Sequence[int] = (),
    ) -> Finished:
        """Run a command until it ends, or a limit ends it.

        Args:
            command: program and arguments, as they are found within.
            files: absolute path -> content, read-only.
            stdin: its standard input.
            descriptors: open files of this process that it has under the same numbers; they are closed here
                once it has them, and if it cannot be started.

        Raises MachineError if the sandbox cannot be set up.
        """
        async with contextlib.AsyncExitStack() as whole:
            start = whole.enter_context(contextlib.ExitStack())
            # 1. What it gets from here, which is closed again once it has it.
            for descriptor in descriptors:
                start.callback(os.close, descriptor)
            status_read, status_write = os.pipe()
            whole.callback(os.close, status_read)
            start.callback(os.close, status_write)
            contents = {path: in_memory(content, start) for path, content in files.items()}
            group = self._group()
            whole.push_async_callback(group.vanish)

            # 2. Start it.
            scheduled_as_others()
            process = await asyncio.create_subprocess_exec(
                *launcher(self.limits, group.entrances, self._limits_memory),
                *bubblewrap(View(disk_bytes=self.limits.disk_bytes, contents=contents)),
                *["--json-status-fd", str(status_write), "--"],
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=[*contents.values(), status_write, *descriptors],
                env={},
            )
            start.close()

            # 3. Until it ends, or has to. Its output is read to the end whatever happens: asyncio waits for
            # that, too.
            output = _Output(self.limits.output_bytes, process)
            streams = asyncio.gather(
                _feed(process, stdin), output.take(process.stdout, 0), output.take(process.stderr, 1)
            )
            ending = Ending.EXITED
            try:
                async with asyncio.timeout(self.limits.wall_s):
                    await asyncio.shield(streams)
                    await process.wait()
            except TimeoutError:
                ending = Ending.OUT_OF_TIME
            finally:
                kill(process)
                group.kill()
                await streams
                await process.wait()
            if output.is_too_much:
                ending = Ending.TOO_MUCH_OUTPUT
            return _finished(ending, group, *output.texts(), exit_status(status_read))

    def _group(self) -> cgroups.Group:
        try:
            label = self._owner.label(self.limits.wall_s + _TEARDOWN_S)
            return cgroups.make_group(
                self.hierarchies, label, self.limits.memory_bytes, self.limits.processes
            )
        except OSError as error:
            raise MachineError(f"a group of processes for a sandbox cannot be made: {error}") from error


class _Output:
    """What a run has written to two streams, up to a limit for both; more of it ends the run."""

    def __init__(self, limit: int, process: asyncio.subprocess.Process) -> None:
        self._left = limit
        self._process = process
        self._pieces: tuple[list[bytes], list[bytes]] = ([], [])
        self.is_too_much = False

    async def take(self, stream: asyncio.StreamReader | None, number: int) -> None:
        """Read a stream to its end."""
        assert stream is not None
        while piece := await stream.read(1 << 16):
            self._pieces[number].append(piece[: self._left])
            if len(piece) > self._left:
                self.is_too_much = True
                kill(self._process)
            self._left = max(0, self._left - len(piece))

    def texts(self) -> tuple[bytes, bytes]:
        """Standard output and error."""
        return b"".join(self._pieces[0]), b"".join(self._pieces[1])


async def _feed(process: asyncio.subprocess.Process, stdin: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError):
        process.stdin.write(stdin)
        await process.stdin.drain()
    process.stdin.close()


def _finished(
    ending: Ending, group: cgroups.Group, stdout: bytes, stderr: bytes, status: int | None
) -> Finished:
    """What it was. Raises MachineError where nothing ended it, and yet it never began."""
    if ending is Ending.EXITED and group.memory_kills():
        ending = Ending.OUT_OF_MEMORY
    if ending is Ending.EXITED and status is None:
        raise MachineError(refusal_of(stderr))
    return Finished(ending=ending, status=_KILLED if status is None else status, stdout=stdout, stderr=stderr)


def open_sandbox(limits: Limits) -> Sandbox:
    """A sandbox of this machine.

    Raises MachineError, with the remedy, without bubblewrap, and for root without a way to limit processes.
    """
    if shutil.which("bwrap") is None:
        raise MachineError(
            "code of responses runs in bubblewrap alone, and this machine has none. Install it: "
            "`apt-get install bubblewrap`, or choose tasks without unit tests."
        )
    sandbox = Sandbox(limits)
    limited = {name for hierarchy in sandbox.hierarchies for name in hierarchy.limits}
    if "pids" not in limited and os.geteuid() == 0:
        # RLIMIT_NPROC does not bind root.
        raise MachineError(
            "root may start any number of processes here, in a sandbox, too: no cgroup that limits them can "
            "be made in /sys/fs/cgroup. Mount it writable, or run as another user."
        )
    cgroups.remove_orphans(sandbox.hierarchies)
    return sandbox
