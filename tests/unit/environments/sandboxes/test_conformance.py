"""Every kind of sandbox keeps the contract of `base.py`: bubblewrap as it is, the others over programs that
look like theirs (`fake_engine.py`)."""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from k25_train.environments.sandboxes import owners
from k25_train.environments.sandboxes.base import (
    Ending,
    SandboxError,
    Sandboxes,
    SandboxLimits,
    SandboxSession,
    SandboxSpec,
)
from k25_train.environments.sandboxes.opening import open_sandboxes
from k25_train.errors import MachineError
from tests.helpers import fake_engine
from tests.helpers.sandboxes import needs_bubblewrap

pytestmark = needs_bubblewrap

LIMITS = SandboxLimits(
    cpus=1.0,
    memory_bytes=256 << 20,
    disk_bytes=16 << 20,
    processes=64,
    output_bytes=10_000,
    ttl_s=300.0,
)
PROGRAMS = {"podman": "container", "docker": "container", "kubectl": "kubernetes", "apptainer": "apptainer"}
Use = Callable[[Sandboxes], Awaitable[None]]


@pytest.fixture(params=["bubblewrap", *PROGRAMS])
def made(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Sandboxes]:
    """Makes sandboxes of a kind."""
    program = str(request.param)
    if program != "bubblewrap":
        fake_engine.install(program, tmp_path / "state", tmp_path / "bin")
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        if program == "docker":
            # podman is taken where it is, as on other machines.
            found = "k25_train.environments.sandboxes.container.shutil.which"
            monkeypatch.setattr(found, lambda name: name if name == "docker" else None)

    def make(limits: SandboxLimits = LIMITS, most: int = 4) -> Sandboxes:
        kind = PROGRAMS.get(program, program)
        image = "" if kind == "bubblewrap" else "python:3.12"
        return open_sandboxes(kind, limits, image=image, run="test", most=most, secret=[])

    return make


def with_session(sandboxes: Sandboxes, use: Callable[[SandboxSession], Awaitable[None]]) -> None:
    """Use one that has two files."""

    async def work() -> None:
        files = {"deep/given.txt": b"given", "/judge/fixed.txt": b"fixed"}
        session = await sandboxes.open(SandboxSpec(name="task", files=files))
        try:
            await use(session)
        finally:
            await sandboxes.close()

    asyncio.run(work())


def test_commands_have_files_input_variables_and_a_status(made: Callable[..., Sandboxes]) -> None:
    async def use(session: SandboxSession) -> None:
        code = "cat deep/given.txt /judge/fixed.txt - ; echo $X; pwd; echo bad >&2; exit 7"
        done = await session.run(["sh", "-c", code], timeout_s=20, stdin=b"typed", variables={"X": "a b"})
        assert (done.ending, done.status) == (Ending.EXITED, 7)
        assert done.stdout == b"givenfixedtypeda b\n/work\n"
        assert done.stderr == b"bad\n"
        done = await session.run(["no-such-program"], timeout_s=20)
        assert (done.ending, done.status) == (Ending.EXITED, 127)
        # What one command leaves, the next one finds.
        await session.run(["sh", "-c", "echo 1 > left"], timeout_s=20)
        assert (await session.run(["cat", "left"], timeout_s=20)).stdout == b"1\n"

    with_session(made(), use)


def test_limits_of_time_and_output_end_a_command_but_not_the_sandbox(
    made: Callable[..., Sandboxes],
) -> None:
    sandboxes = made()

    async def use(session: SandboxSession) -> None:
        done = await session.run(["sh", "-c", "echo begun; sleep 1000"], timeout_s=0.5)
        assert (done.ending, done.status, done.stdout) == (Ending.OUT_OF_TIME, 137, b"begun\n")
        done = await session.run(["yes"], timeout_s=20)
        assert done.ending is Ending.TOO_MUCH_OUTPUT
        assert 0 < len(done.stdout) <= LIMITS.output_bytes + 100
        assert (await session.run(["echo", "alive"], timeout_s=20)).stdout == b"alive\n"
        assert sandboxes.contained["out of time"] == sandboxes.contained["too much output"] == 1

    with_session(sandboxes, use)


def test_files_are_regular_or_none(made: Callable[..., Sandboxes], tmp_path: Path) -> None:
    async def use(session: SandboxSession) -> None:
        await session.write("a/b.bin", bytes(range(256)) * 300)
        assert await session.read("a/b.bin", 76_800) == bytes(range(256)) * 300
        code = "ln -s /etc/passwd link; ln -s / root; mkfifo pipe; ln -s ../.. a/up; rm -r deep; : > empty"
        assert (await session.run(["sh", "-c", code], timeout_s=20)).status == 0
        for path, error in (
            ("a/b.bin", ValueError),
            ("pipe", ValueError),
            ("a", ValueError),
            ("missing", FileNotFoundError),
        ):
            with pytest.raises(error):
                await session.read(path, 1000)
        for path in ("a", "/usr/x", "a/b.bin/c"):
            with pytest.raises(OSError, match=r"."):
                await session.write(path, b"x")
        assert await session.snapshot(1 << 20) == {"a/b.bin": bytes(range(256)) * 300, "empty": b""}
        with pytest.raises(ValueError, match=r"more|longer"):
            await session.snapshot(10_000)

    with_session(made(), use)


def test_a_command_that_goes_on_is_spoken_to(made: Callable[..., Sandboxes]) -> None:
    async def use(session: SandboxSession) -> None:
        code = 'while read line; do echo "got $line"; done'
        process = await session.start(["sh", "-c", code])
        await process.write(b"one\ntwo\n")
        assert [await process.read_line(20), await process.read_line(20)] == [b"got one\n", b"got two\n"]
        with pytest.raises(TimeoutError):
            await process.read_line(0.1)
        await process.close()
        ended = await session.start(["sh", "-c", "echo last; printf rest"])
        assert [await ended.read_line(20) for _ in range(3)] == [b"last\n", b"rest", b""]
        flood = await session.start(["yes", "x" * 100])
        await asyncio.sleep(0.3)
        await flood.close()
        beats = await session.start(["sh", "-c", "while echo x >> beats; do sleep 0.02; done"])
        while not (await session.snapshot(1000)).get("beats"):
            await asyncio.sleep(0.02)
        await beats.close()
        had = await session.read("beats", 10**6)
        await asyncio.sleep(0.2)
        assert await session.read("beats", 10**6) == had, "it goes on though it was closed"

    with_session(made(), use)


def test_what_is_closed_is_gone_and_says_so(made: Callable[..., Sandboxes]) -> None:
    async def use(session: SandboxSession) -> None:
        await asyncio.gather(session.close(), session.close())
        for call in (
            lambda: session.run(["true"], timeout_s=1),
            lambda: session.start(["true"]),
            lambda: session.read("x", 1),
            lambda: session.write("x", b""),
            lambda: session.snapshot(1),
        ):
            with pytest.raises(SandboxError, match="sandbox task is closed"):
                await call()

    with_session(made(), use)


def test_there_are_as_many_as_there_may_be_and_who_waited_longest_is_next(
    made: Callable[..., Sandboxes],
) -> None:
    async def work() -> None:
        sandboxes = made(most=2)
        first, second = [await sandboxes.open(SandboxSpec(name=str(number))) for number in range(2)]
        order: list[str] = []

        async def wait(name: str) -> None:
            session = await sandboxes.open(SandboxSpec(name=name))
            order.append(name)
            await session.close()

        waiting = [asyncio.create_task(wait(name)) for name in "abc"]
        await asyncio.sleep(0.1)
        assert order == []
        waiting[0].cancel()
        await first.close()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert order == ["b", "c"]
        await second.close()
        await sandboxes.close()

    asyncio.run(work())


def test_time_to_live_ends_what_is_forgotten(made: Callable[..., Sandboxes]) -> None:
    async def work() -> None:
        limits = SandboxLimits(**{**{name: getattr(LIMITS, name) for name in LIMITS.__slots__}, "ttl_s": 1.0})
        sandboxes = made(limits)
        session = await sandboxes.open(SandboxSpec(name="task"))
        await asyncio.sleep(1.5)
        with pytest.raises(SandboxError, match=r"environment\.sandbox\.ttl_s=1"):
            await session.run(["true"], timeout_s=1)
        assert sandboxes.contained["expired"] == 1
        await sandboxes.close()

    asyncio.run(work())


@pytest.mark.parametrize("made", list(PROGRAMS), indirect=True)
def test_forgotten_ones_of_other_programs_are_removed_and_those_in_use_are_not(
    made: Callable[..., Sandboxes], tmp_path: Path
) -> None:
    here = owners.this_process("run")
    theirs = owners.Owner(999_999_999, "1", here.machine, here.run)
    elsewhere = owners.Owner(1, "1", "00000000", here.run)

    async def work() -> None:
        sandboxes = made()
        session = await sandboxes.open(SandboxSpec(name="task"))
        for label in (theirs.label(60), elsewhere.label(60), elsewhere.label(-1)):
            (tmp_path / "state/all" / f"k25-sandbox-{label}").mkdir()
        assert await sandboxes.reconcile() == 2
        assert (await session.run(["echo", "alive"], timeout_s=20)).stdout == b"alive\n"
        await sandboxes.close()

    asyncio.run(work())
    (left,) = (tmp_path / "state/all").iterdir()
    assert "00000000" in left.name


@pytest.mark.parametrize("made", list(PROGRAMS), indirect=True)
def test_one_that_ends_itself_is_the_policys_doing_and_a_program_that_fails_is_not(
    made: Callable[..., Sandboxes], tmp_path: Path
) -> None:
    async def use(session: SandboxSession) -> None:
        assert (await session.run(["true"], timeout_s=20)).status == 0
        for program in (tmp_path / "bin").iterdir():
            whole = program.read_text()
            program.write_text("#!/bin/sh\necho no connection >&2; exit 1\n")
            with pytest.raises(SandboxError, match="no connection"):
                await session.run(["true"], timeout_s=20)
            program.write_text(whole)
        (folder,) = (tmp_path / "state/all").iterdir()
        folder.rename(tmp_path / "gone")
        for _ in range(2):
            assert (await session.run(["true"], timeout_s=20)).ending is Ending.DESTROYED
        assert await session.snapshot(1000) == {}

    with_session(made(), use)


@pytest.mark.parametrize("made", ["podman", "apptainer"], indirect=True)
def test_programs_are_told_the_limits(made: Callable[..., Sandboxes], tmp_path: Path) -> None:
    with_session(made(), lambda session: session.close())
    calls = [json.loads(line) for line in (tmp_path / "state/calls").read_text().splitlines()]
    told = next(" ".join(words) for words in calls if "run" in words or "start" in words)
    for option in ("--memory 268435456", "--cpus 1", "--pids-limit 64", "--network none", "python:3.12"):
        assert option in told


@pytest.mark.parametrize("made", ["kubectl"], indirect=True)
def test_pods_end_by_themselves_and_have_no_network(made: Callable[..., Sandboxes], tmp_path: Path) -> None:
    with_session(made(), lambda session: session.close())
    pod = json.loads((tmp_path / "state/Pod.json").read_text())
    policy = json.loads((tmp_path / "state/NetworkPolicy.json").read_text())
    assert pod["spec"]["activeDeadlineSeconds"] == 301
    assert policy["spec"]["podSelector"]["matchLabels"] == pod["metadata"]["labels"]
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert len(pod["metadata"]["name"]) <= 63


@pytest.mark.parametrize("kind", ["container", "kubernetes", "apptainer"])
def test_what_is_not_installed_is_named_with_the_remedy(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(MachineError, match="or use kind=bubblewrap"):
        open_sandboxes(kind, LIMITS, image="x", run="test", most=1, secret=[])
