"""Programs that attack their sandbox are contained and counted; what it may see and reach is decided."""

import asyncio
import os
from pathlib import Path

import pytest

from k25_train.environments.sandboxes import cgroups
from k25_train.environments.sandboxes.base import Ending, SandboxError, SandboxLimits, SandboxSpec
from k25_train.environments.sandboxes.bubblewrap import LABEL, reconcile
from k25_train.environments.sandboxes.opening import open_sandboxes
from k25_train.environments.sandboxes.owners import this_process
from tests.helpers.hostile import HOSTILE, contain
from tests.helpers.sandboxes import needs_bubblewrap

pytestmark = needs_bubblewrap

LIMITS = SandboxLimits(
    cpus=1.0,
    memory_bytes=96 << 20,
    disk_bytes=8 << 20,
    processes=32,
    output_bytes=10_000,
    ttl_s=300.0,
)
QUICK = (
    "fork bomb that leaves its session",
    "10 GB written",
    "10 GB in shared memory",
    "10 GB printed",
    "memory hog",
    "symlink to this machine",
    "root of the first process",
    "network call",
    "first process killed",
    "our packages imported",
)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in HOSTILE]
)
def test_a_hostile_program_is_contained_and_counted(name: str) -> None:
    async def work() -> None:
        sandboxes = open_sandboxes("bubblewrap", LIMITS, run="test", most=2, secret=[])
        assert await contain(sandboxes, name) == ""
        # The next one is none the worse.
        session = await sandboxes.open(SandboxSpec(name="next"))
        assert (await session.run(["echo", "fine"], timeout_s=30)).stdout == b"fine\n"
        await sandboxes.close()

    asyncio.run(work())
    mine = f"{cgroups.PREFIX}-{os.getpid()}.*"
    assert [folder for where in cgroups.hierarchies() for folder in where.parent.glob(mine)] == []


def test_what_ends_its_own_sandbox_is_the_policys_doing() -> None:
    async def work() -> None:
        sandboxes = open_sandboxes("bubblewrap", LIMITS, run="test", most=2, secret=[])
        session = await sandboxes.open(SandboxSpec(name="task"))
        await session.run(["true"], timeout_s=30)
        for pid in _members():
            os.kill(pid, 9)
        assert (await session.run(["true"], timeout_s=30)).ending is Ending.DESTROYED
        assert await session.snapshot(1000) == {}
        with pytest.raises(OSError, match="the sandbox is gone"):
            await session.write("x", b"")
        assert sandboxes.contained["sandbox destroyed"] == 1
        await sandboxes.close()

    asyncio.run(work())


def _members() -> list[int]:
    """Processes of this process's sandboxes."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if (
                folder.name.isdigit()
                and f"{LABEL}={os.getpid()}.".encode() in (folder / "environ").read_bytes()
            ):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_a_port_of_this_machine_is_reached_where_it_is_granted_and_no_other() -> None:
    async def work() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"heard " + await reader.readline())
            writer.close()

        servers = [await asyncio.start_server(answer, "127.0.0.1", 0) for _ in range(2)]
        granted, other = [server.sockets[0].getsockname()[1] for server in servers]
        sandboxes = open_sandboxes("bubblewrap", LIMITS, run="test", most=2, secret=[])
        session = await sandboxes.open(SandboxSpec(name="task", ports=(granted,)))
        code = "import socket, sys\nline = socket.create_connection(('127.0.0.1', int(sys.argv[1])), 5)\n"
        code += "line.sendall(b'hello\\n')\nprint(line.makefile().read())"
        done = await session.run(["python3", "-c", code, str(granted)], timeout_s=30)
        assert done.stdout == b"heard hello\n\n"
        refused = await session.run(["python3", "-c", code, str(other)], timeout_s=30)
        assert b"Connection refused" in refused.stderr
        await sandboxes.close()
        for server in servers:
            server.close()

    asyncio.run(work())


def test_folders_are_read_only_and_secret_ones_are_refused(tmp_path: Path) -> None:
    for name in ("corpus", "run/checkpoints"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "corpus/page").write_text("text", encoding="utf-8")
    sandboxes = open_sandboxes("bubblewrap", LIMITS, run="test", most=2, secret=[tmp_path / "run"])

    async def work() -> None:
        spec = SandboxSpec(name="task", folders={"/corpus": tmp_path / "corpus"})
        session = await sandboxes.open(spec)
        done = await session.run(["sh", "-c", "cat /corpus/page; rm /corpus/page"], timeout_s=30)
        assert (done.stdout, done.status) == (b"text", 1)
        assert b"Read-only" in done.stderr
        await sandboxes.close()
        for folder in (tmp_path, tmp_path / "run", tmp_path / "run/checkpoints", Path("/"), Path("/etc/ssl")):
            with pytest.raises(SandboxError, match="may not show"):
                await sandboxes.open(SandboxSpec(name="task", folders={"/x": folder}))

    asyncio.run(work())


def test_nothing_of_this_processs_environment_or_user_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "xyz")

    async def work() -> None:
        sandboxes = open_sandboxes("bubblewrap", LIMITS, run="test", most=2, secret=[])
        session = await sandboxes.open(SandboxSpec(name="task"))
        done = await session.run(["sh", "-c", "env; cat /proc/1/environ; ls -a /root /home"], timeout_s=30)
        assert b"xyz" not in done.stdout and LABEL.encode() not in done.stdout
        assert b".ssh" not in done.stdout
        await sandboxes.close()

    asyncio.run(work())


def test_processes_of_the_dead_are_ended_and_those_of_the_living_kept(tmp_path: Path) -> None:
    here = this_process("run")
    for pid, label in ((999_999_991, here.label(-1)), (999_999_992, here.label(60))):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "environ").write_bytes(f"A=b\0{LABEL}={label}\0".encode())
    (tmp_path / "self").mkdir()
    assert reconcile([], tmp_path) == 1
