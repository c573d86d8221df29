"""What code in a sandbox may not do, tried; and that nothing of it is left."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from k25_train.environments.sandboxes import cgroups
from k25_train.environments.sandboxes.base import Ending, Finished
from k25_train.environments.sandboxes.command_line import Limits
from k25_train.environments.sandboxes.one_shot import open_sandbox
from k25_train.errors import MachineError
from tests.helpers.project_sources import REPO
from tests.helpers.sandboxes import LIMITS, PYTHON, needs_bubblewrap

pytestmark = needs_bubblewrap


def run(code: str, limits: Limits = LIMITS, stdin: bytes = b"") -> Finished:
    """What becomes of a Python program in a sandbox that has one file."""
    sandbox = open_sandbox(limits)
    return asyncio.run(sandbox.run([*PYTHON, code], {"/judge/given.txt": b"given"}, stdin))


def groups() -> list[Path]:
    """Groups of sandboxes that this process has left."""
    found = [
        hierarchy.parent.glob(f"{cgroups.PREFIX}-{os.getpid()}.*") for hierarchy in cgroups.hierarchies()
    ]
    return [folder for folders in found for folder in folders]


def test_a_program_has_its_files_its_input_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "xyz")
    code = """
import os, sys
print(open("/judge/given.txt").read(), sys.stdin.read(), sorted(os.listdir("/judge")))
print(sorted(os.environ), os.getuid(), len(os.listdir("/proc/self/fd")))
print(os.path.exists(sys.argv[0] or "/"), [name for name in os.listdir("/proc") if name.isdigit()])
open("/work/file", "w").write("kept for now")
sys.exit(7)
"""
    done = run(code, stdin=b"typed")
    lines = done.stdout.decode().splitlines()
    assert (done.ending, done.status, done.stderr) == (Ending.EXITED, 7, b"")
    assert lines[0] == "given typed ['given.txt']"
    # 3 streams and the listing itself: no way back to bubblewrap or to us.
    assert lines[1] == "['HOME', 'LANG', 'PATH', 'PWD'] 65534 4"
    assert len(lines[2].split(",")) <= 3
    assert groups() == []


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("open('/judge/given.txt', 'w')", "Read-only file system"),
        ("open('/usr/x', 'w')", "Read-only file system"),
        ("open('/x', 'w')", "Read-only file system"),
        ("import os; os.remove('/judge/given.txt')", "Read-only file system"),
        ("import socket; socket.create_connection(('1.1.1.1', 80), 2)", "Network is unreachable"),
        ("import socket; socket.getaddrinfo('example.org', 80)", "gaierror"),
        ("open('/work/big', 'wb').write(b'a' * (1 << 26))", "File too large"),
        ("[open(f'/work/{i}', 'wb').write(b'a' * (1 << 23)) for i in range(9)]", "No space left on device"),
        ("import os; os.unshare(os.CLONE_NEWUSER)", "No space left on device"),
        ("import os; os.setuid(0)", "Errno"),
        ("open('/proc/sys/kernel/hostname', 'w')", "Read-only file system"),
        ("open('/proc/sys/kernel/core_pattern', 'w')", "Read-only file system"),
        ("open('/proc/self/oom_score_adj', 'w')", "Read-only file system"),
        (f"print(open({str(REPO / 'setup.py')!r}).read())", "No such file"),
    ],
)
def test_what_may_not_be_done_fails_within(code: str, says: str) -> None:
    done = run(code)
    assert done.status != 0
    assert says in done.stderr.decode()


@pytest.mark.parametrize(
    ("code", "limits", "ending"),
    [
        ("while True: pass", replace(LIMITS, wall_s=0.7), Ending.OUT_OF_TIME),
        ("import time; time.sleep(3600)", replace(LIMITS, wall_s=0.7), Ending.OUT_OF_TIME),
        ("print('a' * 10_000_000)", LIMITS, Ending.TOO_MUCH_OUTPUT),
        ("import sys; sys.stderr.write('a' * 10_000_000)", LIMITS, Ending.TOO_MUCH_OUTPUT),
        ("x = [bytearray(1 << 20) for _ in range(300)]", LIMITS, Ending.OUT_OF_MEMORY),
    ],
)
def test_what_takes_too_much_is_ended(code: str, limits: Limits, ending: Ending) -> None:
    done = run(code, limits)
    assert done.ending is ending
    assert done.status != 0
    assert len(done.stdout) + len(done.stderr) <= limits.output_bytes
    assert groups() == []


def test_processor_time_is_limited_for_each_process() -> None:
    done = run("while True: pass", replace(LIMITS, cpu_s=1))
    assert (done.ending, done.status) == (Ending.EXITED, 128 + signal.SIGKILL)


def test_a_fork_bomb_stays_small_and_goes_with_its_sandbox() -> None:
    code = """
import os, time
count = 0
try:
    while True:
        if not os.fork():
            time.sleep(3600)
        count += 1
except OSError:
    print(count, flush=True)
"""
    began = time.monotonic()
    done = run(code)
    assert done.ending is Ending.EXITED
    assert 1 <= int(done.stdout) <= LIMITS.processes
    assert time.monotonic() - began < 3600
    assert groups() == []


def test_a_sandbox_that_cannot_be_set_up_is_our_fault() -> None:
    with pytest.raises(MachineError, match="bubblewrap cannot set up a sandbox"):
        asyncio.run(open_sandbox(LIMITS).run(["true"], {"/usr/given.txt": b""}))
    assert groups() == []


def test_without_bubblewrap_code_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MachineError, match="apt-get install bubblewrap"):
        open_sandbox(LIMITS)


def test_root_is_refused_where_processes_cannot_be_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "hierarchies", lambda: [])
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(MachineError, match="run as another user"):
        open_sandbox(LIMITS)


KILLED = """
import asyncio
from k25_train.environments.sandboxes.one_shot import open_sandbox
from tests.helpers.sandboxes import LIMITS, PYTHON
async def main():
    sandbox = open_sandbox(LIMITS)
    code = "print(1, flush=True); import time; time.sleep(3600)  # MARK"
    runs = [asyncio.create_task(sandbox.run([*PYTHON, code], {})) for _ in range(4)]
    await asyncio.sleep(1)
    print("running", flush=True)
    await asyncio.gather(*runs)
asyncio.run(main())
"""


def test_nothing_outlives_a_killed_controller() -> None:
    mark = f"k25-mark-{os.getpid()}-{time.monotonic_ns()}"
    command = [sys.executable, "-c", KILLED.replace("MARK", mark)]
    controller = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE)
    assert controller.stdout is not None
    assert controller.stdout.readline() == b"running\n"
    assert len(_processes(mark)) >= 4
    controller.kill()
    controller.wait()
    deadline = time.monotonic() + 30
    while _processes(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _processes(mark) == []

    # Its groups are empty folders, which the next one removes.
    left = [
        folder
        for hierarchy in cgroups.hierarchies()
        for folder in hierarchy.parent.glob(f"{cgroups.PREFIX}-{controller.pid}.*")
    ]
    assert left or not cgroups.hierarchies()
    open_sandbox(LIMITS)
    assert not any(folder.exists() for folder in left)


def _processes(mark: str) -> list[int]:
    """Sandboxed processes whose command line has the mark."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark in (folder / "cmdline").read_text() and folder.name != "self":
                found.append(int(folder.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]
