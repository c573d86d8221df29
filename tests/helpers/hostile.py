"""Programs that attack the sandbox they run in, what each has to come to, and how that is counted."""

from dataclasses import dataclass

from k25_train.environments.sandboxes.base import Ending, Finished, Sandboxes, SandboxSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Hostile:
    """One of them."""

    code: str
    """Python, run without site packages."""
    endings: tuple[Ending, ...] = (Ending.EXITED,)
    """How it may end."""
    says: bytes = b""
    """Found in its output or errors."""
    counted: str = ""
    """Cause in `contained` that has to grow; empty where the kernel only says no."""
    timeout_s: float = 3.0
    """Its time."""


ESCAPED = "print('ESCAPED')"
HOSTILE = {
    "fork bomb": Hostile(
        code="import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        endings=(Ending.OUT_OF_TIME,),
        counted="processes",
        timeout_s=1.0,
    ),
    "fork bomb that leaves its session": Hostile(
        code="""
import os, time
for _ in range(1000):
    try:
        if not os.fork():
            os.setsid()
            if os.fork(): os._exit(0)
            time.sleep(3600)
    except OSError as error: print(error); break
""",
        endings=(Ending.EXITED, Ending.OUT_OF_TIME),
        says=b"Resource temporarily unavailable",
        counted="processes",
    ),
    "busy loop": Hostile(
        code="while True: pass", endings=(Ending.OUT_OF_TIME,), counted="out of time", timeout_s=0.5
    ),
    "busy loops on every processor": Hostile(
        code="import os\nfor _ in range(4): os.fork()\nwhile True: pass",
        endings=(Ending.OUT_OF_TIME,),
        counted="out of time",
        timeout_s=1.0,
    ),
    "memory hog": Hostile(
        code="x = []\nwhile True: x.append(bytearray(1 << 20))",
        endings=(Ending.OUT_OF_MEMORY,),
        counted="out of memory",
        timeout_s=20.0,
    ),
    "10 GB written": Hostile(
        code="import os\nfor i in range(10_000): open(f'/work/{i}', 'wb').write(bytes(1 << 20))",
        says=b"No space left on device",
        counted="disk",
        timeout_s=20.0,
    ),
    "10 GB in one file": Hostile(
        code="open('/work/big', 'wb').truncate(10 << 30)", says=b"File too large", timeout_s=20.0
    ),
    "10 GB in shared memory": Hostile(
        code="for i in range(10_000): open(f'/dev/shm/{i}', 'wb').write(bytes(1 << 20))",
        says=b"No space left on device",
        timeout_s=20.0,
    ),
    "10 GB in /dev": Hostile(
        code="open('/dev/x', 'wb').write(bytes(1 << 20))", says=b"Read-only file system"
    ),
    "10 GB printed": Hostile(
        code="while True: print('a' * 100_000)",
        endings=(Ending.TOO_MUCH_OUTPUT,),
        counted="too much output",
        timeout_s=20.0,
    ),
    "symlink to this machine": Hostile(
        code=f"import os\nos.symlink('/', 'r')\nassert os.path.exists('r/etc/shadow')\n{ESCAPED}",
        says=b"AssertionError",
    ),
    "root of the first process": Hostile(
        code=f"import os\nassert os.path.exists('/proc/1/root/etc/shadow')\n{ESCAPED}",
        says=b"AssertionError",
    ),
    "settings of the kernel": Hostile(
        code=f"open('/proc/sys/kernel/core_pattern', 'w').write('|/bin/sh')\n{ESCAPED}",
        says=b"Read-only file system",
    ),
    "more memory for itself": Hostile(
        code=f"open('/proc/self/oom_score_adj', 'w').write('-1000')\n{ESCAPED}", says=b"Read-only file system"
    ),
    "system's programs replaced": Hostile(
        code=f"open('/usr/bin/python3', 'w')\n{ESCAPED}", says=b"Read-only file system"
    ),
    "namespaces of its own": Hostile(
        code=f"import os\nos.unshare(os.CLONE_NEWUSER)\n{ESCAPED}", says=b"No space left on device"
    ),
    "network call": Hostile(
        code=f"import socket\nsocket.create_connection(('1.1.1.1', 80), 2)\n{ESCAPED}",
        says=b"Network is unreachable",
    ),
    "this machine's services": Hostile(
        code=f"import socket\nsocket.create_connection(('127.0.0.1', 22), 2)\n{ESCAPED}",
        says=b"Connection refused",
    ),
    "first process killed": Hostile(
        code="import os\nfor number in (9, 19, 15): os.kill(1, number)\nprint('alive')", says=b"alive"
    ),
    "first process stopped by a debugger": Hostile(
        code="import ctypes\nctypes.CDLL(None).ptrace(16, 1, 0, 0)\nimport time; time.sleep(3600)",
        endings=(Ending.OUT_OF_TIME,),
        counted="out of time",
        timeout_s=0.5,
    ),
    "our packages imported": Hostile(
        code=f"""
import sys
sys.path += ['/opt/site-packages', {__file__.rpartition("/tests/")[0]!r}]
import importlib.util
specs = [importlib.util.find_spec(name) for name in ('k25_train', 'reasoning_gym')]
assert any(spec and spec.origin for spec in specs)
{ESCAPED}""",
        says=b"AssertionError",
    ),
}
"""Name -> program."""


async def contain(sandboxes: Sandboxes, name: str) -> str:
    """Run one in a sandbox of its own: empty where it is contained, otherwise what came of it."""
    hostile = HOSTILE[name]
    before = dict(sandboxes.contained)
    session = await sandboxes.open(SandboxSpec(name=name))
    try:
        command = ["python3", "-I", "-S", "-c", hostile.code]
        done = await session.run(command, timeout_s=hostile.timeout_s)
    finally:
        await session.close()
    return _fault(hostile, done) or _not_counted(hostile, before, dict(sandboxes.contained))


def _fault(hostile: Hostile, done: Finished) -> str:
    text = done.stdout + done.stderr
    if done.ending not in hostile.endings or b"ESCAPED" in text or hostile.says not in text:
        return f"{done.ending} with {done.status}: {text[-300:].decode(errors='replace')}"
    return ""


def _not_counted(hostile: Hostile, before: dict[str, int], after: dict[str, int]) -> str:
    if hostile.counted and after.get(hostile.counted, 0) <= before.get(hostile.counted, 0):
        return f"not counted as {hostile.counted}: {after}"
    return ""
