"""Sandboxes of this machine: bubblewrap around a first process of ours, and groups of the kernel around it.

    this process ─► sh: enters the group, takes its limits ─► bwrap: namespaces ─► session_init ─► commands
         ╚═════════════ stream socket: orders, answers ═══════════════════════════════╝

Nothing of it is on a disk: what it is given comes in files without a name, what it writes is in memory, and
its mounts are those of its namespace. What can be left behind by a killed owner are groups, which `reconcile`
finds by their labels.
"""

import asyncio
import contextlib
import functools
import importlib.machinery
import importlib.util
import marshal
import os
import shutil
import signal
import socket
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from k25_train.environments.sandboxes import cgroups, owners
from k25_train.environments.sandboxes.base import SandboxError, SandboxLimits, SandboxSpec
from k25_train.environments.sandboxes.command_line import (
    View,
    bubblewrap,
    in_memory,
    kill,
    refusal_of,
    scheduled_as_others,
    session_launcher,
)
from k25_train.environments.sandboxes.folders import check_folders
from k25_train.environments.sandboxes.link import BrokenLineError, connect
from k25_train.environments.sandboxes.relays import Relay
from k25_train.environments.sandboxes.room import Room
from k25_train.environments.sandboxes.session import BubblewrapSession
from k25_train.errors import MachineError

LABEL = "K25_SANDBOX"
"""Variable of bubblewrap's process that has the label; nothing within sees it."""
_START_S = 30.0
"""Seconds until the first process has to be there."""
_PACKAGES = "/opt/site-packages"
_INIT = "/opt/session_init.pyc"
_USERS = {
    "/etc/passwd": b"agent:x:65534:65534::/work:/bin/sh\n",
    "/etc/group": b"agent:x:65534:\n",
}
_HOSTS = {"/etc/hosts": b"127.0.0.1 localhost sandbox\n"}


class BubblewrapSandboxes:
    """`Sandboxes` of this machine."""

    def __init__(
        self,
        limits: SandboxLimits,
        *,
        owner: owners.Owner,
        most: int,
        secret: Sequence[Path],
        hierarchies: list[cgroups.Hierarchy],
    ) -> None:
        """Use `opening.open_sandboxes`, which checks the machine; arguments are described there."""
        self._limits = limits
        self._owner = owner
        self._secret = secret
        self._hierarchies = hierarchies
        self._room = Room(most, limits.ttl_s)
        self._limited = {name for hierarchy in hierarchies for name in hierarchy.limits}

    @property
    def contained(self) -> Mapping[str, int]:
        """How often which limit has held, by cause."""
        return self._room.contained

    async def open(self, spec: SandboxSpec) -> BubblewrapSession:
        """A new one. Waits while there are as many as there may be."""
        check_folders(spec, self._secret)
        return await self._room.admit(spec, self._opened)

    async def _opened(self, spec: SandboxSpec) -> BubblewrapSession:
        label = self._owner.label(self._limits.ttl_s)
        ours, theirs = socket.socketpair()
        complaints, complains = os.pipe()
        with contextlib.ExitStack() as start, contextlib.ExitStack() as whole:
            # 1. Its group, and what it gets from here, which is closed again once it has it.
            start.callback(theirs.close)
            start.callback(os.close, complains)
            whole.callback(os.close, complaints)
            absolute = {path: content for path, content in spec.files.items() if os.path.isabs(path)}
            given = {**_USERS, **({} if spec.network else _HOSTS), _INIT: _first_process(), **absolute}
            contents = {path: in_memory(content, start) for path, content in given.items()}
            group = self._group(label)

            # 2. Start it.
            try:
                scheduled_as_others()
                process = await asyncio.create_subprocess_exec(
                    *self._command(spec, group, contents, theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=complains,
                    pass_fds=[*contents.values(), theirs.fileno()],
                    env={LABEL: label},
                )
            except BaseException:
                ours.close()
                await group.vanish()
                raise
            start.close()

            # 3. Until its first process is there.
            relays = [Relay(port) for port in spec.ports]

            async def teardown() -> None:
                for relay in relays:
                    await relay.close()
                kill(process)
                group.kill()
                await process.wait()
                await group.vanish()

            try:
                link, listening = await connect(ours, len(relays), _START_S)
                for relay, each in zip(relays, listening, strict=True):
                    await relay.start(each)
            except BaseException as error:
                await teardown()
                if isinstance(error, BrokenLineError | TimeoutError):
                    raise SandboxError(_why_not(spec.name, complaints)) from error
                raise
        session = BubblewrapSession(spec.name, self._limits, link, group, self._room)
        session.teardown = teardown
        return session

    def _command(
        self, spec: SandboxSpec, group: cgroups.Group, contents: Mapping[str, int], line: int
    ) -> list[str]:
        limits = self._limits
        python_path, packages = _packages()
        view = View(
            disk_bytes=limits.disk_bytes,
            contents=contents,
            folders={**packages, **spec.folders},
            variables={"PYTHONPATH": python_path, **_variables(limits.cpus)},
            network=spec.network,
        )
        processes = 0 if "pids" in self._limited else limits.processes
        return [
            *session_launcher(
                limits.disk_bytes,
                limits.memory_bytes,
                int(limits.ttl_s * limits.cpus) + 1,
                group.entrances,
                self._limited,
            ),
            *bubblewrap(view),
            *("--as-pid-1", "--", os.path.realpath(sys.executable), "-I", "-S", _INIT),
            *map(str, (line, processes, *spec.ports)),
        ]

    def _group(self, label: str) -> cgroups.Group:
        limits = self._limits
        try:
            return cgroups.make_group(
                self._hierarchies, label, limits.memory_bytes, limits.processes, limits.cpus
            )
        except OSError as error:
            raise SandboxError(f"a group of processes for a sandbox cannot be made: {error}") from error

    async def reconcile(self) -> int:
        """Remove those whose owner is gone, or whose time is over; returns how many these were."""
        return await asyncio.to_thread(reconcile, self._hierarchies)

    async def close(self) -> None:
        """Close all that are open."""
        await self._room.close()


def reconcile(hierarchies: list[cgroups.Hierarchy], processes: Path = Path("/proc")) -> int:
    """Remove what is nobody's any more: processes by their label, groups by theirs; returns how many."""
    here, now = owners.machine(), time.time()
    labels = set()
    for folder in processes.iterdir():
        label = _label_of(folder) if folder.name.isdigit() else ""
        if label and owners.may_be_removed(label, here, now):
            with contextlib.suppress(OSError):
                os.kill(int(folder.name), signal.SIGKILL)
            labels.add(label)
    return len(labels | cgroups.remove_orphans(hierarchies))


def _label_of(process: Path) -> str:
    """Label of a process; empty for one that has none, or is not ours to ask."""
    try:
        lines = (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    found = (line for line in lines if line.startswith(f"{LABEL}=".encode()))
    return next(found, b"").decode(errors="replace").removeprefix(f"{LABEL}=")


def open_bubblewrap(
    limits: SandboxLimits, *, run: str, most: int, secret: Sequence[Path]
) -> BubblewrapSandboxes:
    """Sandboxes of this machine.

    Raises MachineError, with the remedy, without bubblewrap, and for root without a way to limit processes.
    """
    hierarchies = checked_hierarchies()
    return BubblewrapSandboxes(
        limits, owner=owners.this_process(run), most=most, secret=secret, hierarchies=hierarchies
    )


def checked_hierarchies() -> list[cgroups.Hierarchy]:
    """Where groups are made on this machine. Raises MachineError if it cannot contain what runs."""
    if shutil.which("bwrap") is None:
        raise MachineError(
            "code of responses runs in bubblewrap alone, and this machine has none. Install it: "
            "`apt-get install bubblewrap`, or choose tasks without unit tests."
        )
    hierarchies = cgroups.hierarchies()
    limited = {name for hierarchy in hierarchies for name in hierarchy.limits}
    if "pids" not in limited and os.geteuid() == 0:
        # RLIMIT_NPROC does not bind root.
        raise MachineError(
            "root may start any number of processes here, in a sandbox, too: no cgroup that limits them can "
            "be made in /sys/fs/cgroup. Mount it writable, or run as another user."
        )
    return hierarchies


@functools.cache
def _first_process() -> bytes:
    """`session_init.py`, compiled by this Python, which also runs it."""
    path = str(Path(__file__).with_name("session_init.py"))
    code = importlib.machinery.SourceFileLoader("session_init", path).get_code("session_init")
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)


@functools.cache
def _packages() -> tuple[str, dict[str, Path]]:
    """PYTHONPATH within, and the folders of packages that are there."""
    paths = sysconfig.get_paths()
    places = dict.fromkeys(Path(paths[key]).resolve() for key in ("purelib", "platlib"))
    folders = {f"{_PACKAGES}{number or ''}": place for number, place in enumerate(places)}
    return ":".join(folders), folders


def _variables(cpus: float) -> dict[str, str]:
    threads = str(max(1, round(cpus)))
    return {
        "PATH": f"{sys.base_prefix}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "USER": "agent",
        "TMPDIR": "/tmp",
        "PYTHONDONTWRITEBYTECODE": "1",
        "IPYTHONDIR": "/tmp/.ipython",
        "MPLCONFIGDIR": "/tmp/.matplotlib",
        "XDG_CACHE_HOME": "/tmp/.cache",
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
    }


def _why_not(name: str, complaints: int) -> str:
    os.set_blocking(complaints, False)
    said = b""
    with contextlib.suppress(BlockingIOError):
        said = os.read(complaints, 1 << 16)
    return f"sandbox {name}: {refusal_of(said)}"
