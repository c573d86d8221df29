"""How fast sandboxes start, what killed owners leave, and whether limits hold.

`python -m tests.bench.sandbox`: starts 400 sandboxes, eight at a time, each with one command; kills 200
controllers that have one open; and lets hostile programs run, each of which has to be contained. Two minutes
on two quiet cores. Ends with 1 where a bar is missed.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from k25_train.environments.sandboxes import cgroups
from k25_train.environments.sandboxes.base import SandboxLimits, SandboxSpec
from k25_train.environments.sandboxes.bubblewrap import LABEL, reconcile
from k25_train.environments.sandboxes.opening import open_sandboxes
from tests.helpers.hostile import HOSTILE, contain
from tests.helpers.project_sources import REPO

BAR_SPAWNS = 60.0
BAR_GONE_S = 5.0
SPAWNS = 400
CONTROLLERS = 200
AT_ONCE = 8
LIMITS = SandboxLimits(
    cpus=1.0,
    memory_bytes=256 << 20,
    disk_bytes=64 << 20,
    processes=64,
    output_bytes=100_000,
    ttl_s=600.0,
)
CONTROLLER = """
import asyncio, sys
from k25_train.environments.sandboxes.base import SandboxSpec
from k25_train.environments.sandboxes.opening import open_sandboxes
from tests.bench.sandbox import LIMITS
async def main():
    sandboxes = open_sandboxes("bubblewrap", LIMITS, run="bench", most=8, secret=[])
    session = await sandboxes.open(SandboxSpec(name="bench"))
    await session.start(["sh", "-c", "setsid sleep 3600 & while :; do sleep 1; done"])
    await session.write("file", b"x" * 100_000)
    print("open", flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""


def main() -> int:
    """Print the figures, then the bars."""
    per_s, p50, p99 = asyncio.run(_spawns())
    print(f"{SPAWNS} sandboxes with a command, {AT_ONCE} at once: p50 {p50:.0f} ms, p99 {p99:.0f} ms")
    gone_s, removed, left = _killed_controllers()
    print(
        f"{CONTROLLERS} controllers killed: processes gone after {gone_s:.2f} s, {removed} groups reconciled"
    )
    missed = asyncio.run(_hostile())
    print(f"hostile programs contained: {len(HOSTILE) - len(missed)} of {len(HOSTILE)}")
    results = [
        (f"{per_s:.0f} sandboxes a second, bar {BAR_SPAWNS:.0f}", per_s >= BAR_SPAWNS),
        (f"left by killed controllers: {left or 'nothing'}, bar nothing", not left),
        (f"gone after {gone_s:.2f} s, bar {BAR_GONE_S:.0f}", gone_s <= BAR_GONE_S),
        (f"not contained: {', '.join(missed) or 'nothing'}, bar nothing", not missed),
    ]
    for text, is_kept in results:
        print(f"{text}: {'kept' if is_kept else 'MISSED'}")
    return int(not all(is_kept for _, is_kept in results))


async def _spawns() -> tuple[float, float, float]:
    """Sandboxes a second, and percentiles of the time to open one, in ms."""
    sandboxes = open_sandboxes("bubblewrap", LIMITS, run="bench", most=AT_ONCE, secret=[])
    await sandboxes.reconcile()
    seconds: list[float] = []
    room = asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        async with room:
            began = time.perf_counter()
            session = await sandboxes.open(SandboxSpec(name="bench"))
            seconds.append(time.perf_counter() - began)
            assert (await session.run(["true"], timeout_s=30)).status == 0
            await session.close()

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(SPAWNS)))
    per_s = SPAWNS / (time.perf_counter() - began)
    p50, p99 = np.percentile(np.array(seconds) * 1e3, [50, 99])
    return per_s, float(p50), float(p99)


def _killed_controllers() -> tuple[float, int, list[str]]:
    """Seconds until the last process is gone, labels that were reconciled, and what is left after that."""
    mounts = _mounts()
    slowest, removed = 0.0, 0
    controllers: list[int] = []
    for start in range(0, CONTROLLERS, AT_ONCE):
        started = [
            subprocess.Popen([sys.executable, "-c", CONTROLLER], cwd=REPO, stdout=subprocess.PIPE)
            for _ in range(min(AT_ONCE, CONTROLLERS - start))
        ]
        for each in started:
            assert each.stdout is not None
            assert each.stdout.readline() == b"open\n"
        for each in started:
            os.kill(each.pid, signal.SIGKILL)
        began = time.perf_counter()
        for each in started:
            each.wait()
            controllers.append(each.pid)
        while _processes(controllers) and time.perf_counter() - began < 30:
            time.sleep(0.01)
        slowest = max(slowest, time.perf_counter() - began)
        removed += reconcile(cgroups.hierarchies())
    left = [f"process {pid}" for pid in _processes(controllers)]
    left += [str(folder) for pid in controllers for folder in _groups(pid)]
    left += [f"mount {mount}" for mount in _mounts() - mounts]
    left += [str(folder) for folder in Path("/tmp").glob("k25-sandbox*")]
    return slowest, removed, left


def _groups(pid: int) -> list[Path]:
    return [
        folder
        for hierarchy in cgroups.hierarchies()
        for folder in hierarchy.parent.glob(f"{cgroups.PREFIX}-{pid}.*")
    ]


def _processes(controllers: list[int]) -> list[int]:
    """Living processes of sandboxes of these controllers, by their groups, or by bubblewrap's variable."""
    found = {int(pid) for each in controllers for folder in _groups(each) for pid in _members(folder)}
    owned = tuple(f"{LABEL}={pid}.".encode() for pid in controllers)
    for folder in Path("/proc").iterdir():
        try:
            lines = (folder / "environ").read_bytes().split(b"\0") if folder.name.isdigit() else []
        except OSError:
            continue
        if any(line.startswith(owned) for line in lines):
            found.add(int(folder.name))
    return sorted(found)


def _members(folder: Path) -> list[str]:
    try:
        return (folder / "cgroup.procs").read_text(encoding="utf-8").split()
    except OSError:
        return []


def _mounts() -> set[str]:
    return set(Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines())


async def _hostile() -> list[str]:
    """Names of those that were not contained."""
    sandboxes = open_sandboxes("bubblewrap", LIMITS, run="bench", most=AT_ONCE, secret=[])
    missed = []
    for name in HOSTILE:
        why = await contain(sandboxes, name)
        print(f"  {name}: {why or 'contained'}")
        missed += [name] if why else []
    counted = ", ".join(f"{cause} {count}" for cause, count in sandboxes.contained.items() if count)
    print(f"  counted: {counted}")
    return missed


if __name__ == "__main__":
    sys.exit(main())
