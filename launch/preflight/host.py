"""Memory, disks and limits of a node's operating system, and what must hold of them."""

import re
from dataclasses import dataclass
from pathlib import Path

from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.machine import Machine

GIB = 2**30
MEMORY_SHARE = 0.95
"""Share of `cluster.host_memory_gib` that must be there: firmware and kernel keep some for themselves."""
AVAILABLE_SHARE = 0.9
"""Share of a node's memory that should be free; else another job, or what a dead one left, is there."""
SHARED_MEMORY_BYTES = GIB
"""What /dev/shm must offer: ranks of a node talk through it, and a container has 64 MiB unless told."""

CHECKPOINTS = "checkpoints"
"""Of a run's folder."""

MEMORY, DISK, SHARED_MEMORY = "host memory", "disk of the run", "/dev/shm"
PINNED, INTERFACE = ACCESS_CHECKS = ("pinned memory", "interface")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The operating system of a node; None stands for what it does not show."""

    kernel: str
    memory_bytes: int | None
    available_bytes: int | None
    shared_memory_bytes: int
    """Size of /dev/shm."""
    run_free_bytes: int
    """Free space of the file system that the run folder is on."""
    checkpoint_bytes: int
    """What checkpoints of the run, which goes on after a fault, take of it already."""
    locked_memory_bytes: int | None
    """Memory that a process may pin; None is any amount."""
    interfaces: tuple[str, ...]
    """Network interfaces that are up."""


def read_host(machine: Machine, run_dir: Path) -> Host:
    """The node's own facts."""
    meminfo = dict(re.findall(r"^(\w+):\s+(\d+) kB$", machine.read("proc/meminfo") or "", re.MULTILINE))
    limit = re.search(r"^Max locked memory\s+(\d+)", machine.read("proc/self/limits") or "", re.MULTILINE)
    net = "sys/class/net"
    return Host(
        kernel=machine.read("proc/sys/kernel/osrelease") or "",
        memory_bytes=1024 * int(meminfo["MemTotal"]) if "MemTotal" in meminfo else None,
        available_bytes=1024 * int(meminfo["MemAvailable"]) if "MemAvailable" in meminfo else None,
        shared_memory_bytes=machine.usage(Path("/dev/shm")).total_bytes,
        run_free_bytes=machine.usage(run_dir).free_bytes,
        checkpoint_bytes=machine.bytes_in(f"{run_dir.relative_to('/')}/{CHECKPOINTS}"),
        locked_memory_bytes=int(limit[1]) if limit else None,
        interfaces=tuple(
            name
            for name in machine.names(net)
            if machine.read(f"{net}/{name}/operstate") in ("up", "unknown")
        ),
    )


def judge_host(host: Host, *, memory_gib: float, run_dir: str, run_bytes: int) -> list[Finding]:
    """Memory against `cluster.host_memory_gib`, the run's disk against its checkpoints, /dev/shm."""
    return [
        _judge_memory(host, memory_gib),
        _judge_disk(host, run_dir, run_bytes),
        _judge_shared_memory(host),
    ]


def judge_network_access(host: Host, interface: str) -> list[Finding]:
    """What RDMA and the ranks' meeting need of the operating system."""
    check = PINNED
    findings = [passed(check, "any amount")]
    if host.locked_memory_bytes is not None:
        rule = "RDMA pins its buffers; the limit must be unlimited"
        remedy = "ulimit -l unlimited: LimitMEMLOCK=infinity of slurmd, --ulimit memlock=-1 of docker"
        findings = [failed(check, f"at most {host.locked_memory_bytes:,} bytes", rule, remedy)]
    check = INTERFACE
    if interface in host.interfaces:
        return [*findings, passed(check, f"{interface} is up")]
    up = ", ".join(host.interfaces) or "none"
    rule = "cluster.fabric.interface must be there and up on every node"
    return [
        *findings,
        failed(check, f"{interface} is not; up: {up}", rule, "bring it up or correct the cluster file"),
    ]


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


def _judge_disk(host: Host, run_dir: str, run_bytes: int) -> Finding:
    check = DISK
    found = f"{host.run_free_bytes / GIB:,.1f} GiB free at {run_dir}"
    if host.checkpoint_bytes:
        found += f", {host.checkpoint_bytes / GIB:,.1f} GiB are its checkpoints"
    if host.run_free_bytes + host.checkpoint_bytes < run_bytes:
        rule = f"checkpoint.keep + 1 checkpoints take {run_bytes / GIB:,.1f} GiB"
        return failed(check, found, rule, "free space, choose another run.dir, or lower checkpoint.keep")
    return passed(check, found)


def _judge_shared_memory(host: Host) -> Finding:
    check = SHARED_MEMORY
    found = f"{host.shared_memory_bytes / GIB:,.2f} GiB"
    if host.shared_memory_bytes < SHARED_MEMORY_BYTES:
        rule = "NCCL and the data loader need 1 GiB"
        return failed(check, found, rule, "docker run --shm-size=8g, or shm_size in the compose file")
    return passed(check, found)
