"""Memory, disks and limits of a node's operating system, and checks of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k25_train.config.checkpoint import EXTRA_CHECKPOINTS
from k25_train.units import GIB
from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.system import System

MEMORY_SHARE = 0.95
"""Share of `cluster.host_memory_gib` that must be visible: firmware and kernel reserve some."""
AVAILABLE_SHARE = 0.9
"""Share of a node's memory that should be free; less means another job, or leftovers of a dead one."""
SHARED_MEMORY_BYTES = GIB
"""Smallest size of /dev/shm, through which ranks of a node communicate; a container has 64 MiB by default."""

UNLIMITED = -1
"""Value of a limit that there is none."""

MEMORY, DISK, SHARED_MEMORY = "host memory", "disk of the run", "/dev/shm"
PINNED, INTERFACE = ACCESS_CHECKS = ("pinned memory", "interface")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The operating system of a node; None for values that it does not show."""

    kernel: str
    memory_bytes: int | None
    available_bytes: int | None
    shared_memory_bytes: int | None
    """Size of /dev/shm; None if it is no file system of its own."""
    run_free_bytes: int | None
    """Free space of the file system that the run's checkpoints are on; None for an object store."""
    checkpoint_bytes: int
    """Size of checkpoints that the run already has, as when it goes on after a fault."""
    locked_memory_bytes: int | None
    """Memory that a process may pin, or `UNLIMITED`."""
    interfaces: tuple[str, ...]
    """Network interfaces that are up."""


def read_host(system: System, checkpoints: Path | None) -> Host:
    """Read the operating system's values.

    Args:
        system: of the node.
        checkpoints: folder of the run's checkpoints, absolute; None for an object store.
    """
    meminfo = dict(re.findall(r"^(\w+):\s+(\d+) kB$", system.read("proc/meminfo") or "", re.MULTILINE))
    limits = read_limits(system)
    mounts = system.read("proc/mounts")
    net = "sys/class/net"
    return Host(
        kernel=system.read("proc/sys/kernel/osrelease") or "",
        memory_bytes=1024 * int(meminfo["MemTotal"]) if "MemTotal" in meminfo else None,
        available_bytes=1024 * int(meminfo["MemAvailable"]) if "MemAvailable" in meminfo else None,
        shared_memory_bytes=system.usage(Path("/dev/shm")).total_bytes
        if mounts is None or re.search(r"^\S+ /dev/shm ", mounts, re.MULTILINE)
        else None,
        run_free_bytes=None if checkpoints is None else system.usage(checkpoints).free_bytes,
        checkpoint_bytes=0 if checkpoints is None else system.bytes_in(str(checkpoints.relative_to("/"))),
        locked_memory_bytes=limits.get("Max locked memory"),
        interfaces=tuple(
            name for name in system.names(net) if system.read(f"{net}/{name}/operstate") in ("up", "unknown")
        ),
    )


def read_limits(system: System) -> dict[str, int]:
    """Name of a limit of this process, as in /proc/self/limits -> its soft limit, or `UNLIMITED`."""
    rows = re.findall(
        r"^(Max [a-z ]*?[a-z])\s{2,}(\d+|unlimited)", system.read("proc/self/limits") or "", re.M
    )
    return {name: UNLIMITED if value == "unlimited" else int(value) for name, value in rows}


def judge_host(
    host: Host, *, memory_gib: float, checkpoints: str, num_kept: int, one_bytes: int
) -> list[Finding]:
    """Check memory against `cluster.host_memory_gib`, the disk against the checkpoints' size, and
    /dev/shm.

    Args:
        host: what was read.
        memory_gib: `cluster.host_memory_gib`.
        checkpoints: where checkpoints are.
        num_kept: `checkpoint.keep`.
        one_bytes: size of a checkpoint.
    """
    return [
        _judge_memory(host, memory_gib),
        _judge_disk(host, checkpoints, num_kept, one_bytes),
        _judge_shared_memory(host),
    ]


def judge_network_access(host: Host, interfaces: Sequence[str]) -> list[Finding]:
    """Check what RDMA and the rendezvous need from the operating system."""
    check = PINNED
    findings = [passed(check, "any amount")]
    if host.locked_memory_bytes is None:
        findings = [skipped(check, "no /proc/self/limits")]
    elif host.locked_memory_bytes != UNLIMITED:
        rule = "RDMA pins its buffers; the limit must be unlimited"
        remedy = "ulimit -l unlimited: LimitMEMLOCK=infinity of slurmd, --ulimit memlock=-1 of docker"
        findings = [failed(check, f"at most {host.locked_memory_bytes:,} bytes", rule, remedy)]
    check = INTERFACE
    down = [name for name in interfaces if name not in host.interfaces]
    if not down:
        return [*findings, passed(check, f"{_are(interfaces)} up")]
    found = f"{_are(down)} not up; up: {', '.join(host.interfaces) or 'none'}"
    rule = "cluster.fabric.interface must exist and be up on every node"
    return [*findings, failed(check, found, rule, "bring it up or correct the cluster file")]


def _are(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"


def _judge_memory(host: Host, memory_gib: float) -> Finding:
    check = MEMORY
    if host.memory_bytes is None or host.available_bytes is None:
        return skipped(check, "no /proc/meminfo")
    found = f"{host.memory_bytes / GIB:,.0f} GiB, {host.available_bytes / GIB:,.0f} available"
    if host.memory_bytes < MEMORY_SHARE * memory_gib * GIB:
        rule = f"cluster.host_memory_gib is {memory_gib:g}"
        return failed(
            check, found, rule, "check for a failed module and drain the node, or correct the cluster file"
        )
    if host.available_bytes < AVAILABLE_SHARE * min(host.memory_bytes, memory_gib * GIB):
        rule = f"{AVAILABLE_SHARE:.0%} of it should be free before the job"
        return warned(check, found, rule, "look for leftovers of other jobs (ps, /dev/shm)")
    return passed(check, found)


def _judge_disk(host: Host, checkpoints: str, num_kept: int, one_bytes: int) -> Finding:
    """Every run needs room for one checkpoint beyond those that are kept; some for unsound ones too."""
    check = DISK
    if host.run_free_bytes is None:
        return skipped(check, f"{checkpoints} is an object store, which does not tell its room")
    found = f"{host.run_free_bytes / GIB:,.1f} GiB free at {checkpoints}"
    if host.checkpoint_bytes:
        found += f", {host.checkpoint_bytes / GIB:,.1f} GiB used by its checkpoints"
    remedy = "free space, choose another checkpoint.dir or run.dir, or lower checkpoint.keep"
    for extra, judge, when in ((1, failed, ""), (EXTRA_CHECKPOINTS, warned, ", if some are set aside")):
        needed_bytes = (num_kept + extra) * one_bytes
        if host.run_free_bytes + host.checkpoint_bytes < needed_bytes:
            rule = f"checkpoint.keep + {extra} checkpoints take {needed_bytes / GIB:,.1f} GiB{when}"
            return judge(check, found, rule, remedy)
    return passed(check, found)


def _judge_shared_memory(host: Host) -> Finding:
    check = SHARED_MEMORY
    if host.shared_memory_bytes is None:
        rule = "ranks of a node communicate through it, which must be memory, not a disk"
        return failed(
            check, "is no file system of its own", rule, "mount a tmpfs there (docker run --shm-size=8g)"
        )
    found = f"{host.shared_memory_bytes / GIB:,.2f} GiB"
    if host.shared_memory_bytes < SHARED_MEMORY_BYTES:
        rule = "NCCL and the data loader need 1 GiB"
        return failed(check, found, rule, "docker run --shm-size=8g, or shm_size in the compose file")
    return passed(check, found)
