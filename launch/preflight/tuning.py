"""Settings of the operating system that make a job slow, or break it when it grows."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.host import UNLIMITED, read_limits
from launch.preflight.system import System

GOVERNOR, NUMA, HUGE_PAGES, SWAP, FILES, PROCESSES, CORES = TUNING_CHECKS = (
    "CPU governor",
    "NUMA balancing",
    "huge pages",
    "swap",
    "open files",
    "processes",
    "core dumps",
)
CPUS = "sys/devices/system/cpu"
FAST_DRIVERS = ("intel_pstate", "amd-pstate-epp", "amd-pstate")
"""Drivers whose governor `powersave` only allows the hardware to choose; what it prefers is in
`energy_performance_preference`."""
SPARE_FILES = 896
"""Files and connections of a process apart from those to all ranks. Our choice: 1024, the usual limit of a
shell, is enough for a job of 16 nodes."""
GOOD_FILES = 65_536
"""Open files from which nobody has run into the limit. Our choice; DGX systems have 1,048,576."""
PROCESSES_PER_RANK = 1000
"""Processes and threads of a rank with its loader: worker processes, and a thread per core in each of several
libraries. Our choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Settings; None, or missing from a mapping, for what the kernel does not show."""

    governors: Mapping[str, int]
    """Governor, with the preference of the hardware if it has one -> number of CPUs."""
    numa_balancing: str | None
    num_numa_nodes: int
    huge_pages: str | None
    """`always`, `madvise` or `never`."""
    huge_page_defrag: str | None
    swap_used_kib: int | None
    """None if there is no file about it; 0 without swap."""
    limits: Mapping[str, int]
    """Name as in /proc/self/limits -> soft limit, or `UNLIMITED`."""
    pid_max: int | None
    cgroup_pids_max: int | None
    """Processes that the job's group may have; `UNLIMITED` if any."""
    core_pattern: str | None
    """Where the kernel writes the memory of a process that crashed: a path, or `|PROGRAM`."""


def read_tuning(system: System) -> Tuning:
    """Read the settings."""
    huge = "sys/kernel/mm/transparent_hugepage"
    swaps = system.read("proc/swaps")
    used = re.findall(r"^\S+\s+\S+\s+\d+\s+(\d+)", swaps or "", re.MULTILINE)
    governors = Counter(
        _governor(system, f"{CPUS}/{name}/cpufreq")
        for name in system.names(CPUS)
        if re.fullmatch(r"cpu\d+", name)
    )
    return Tuning(
        governors={name: count for name, count in governors.items() if name},
        numa_balancing=system.read("proc/sys/kernel/numa_balancing"),
        num_numa_nodes=sum(
            bool(re.fullmatch(r"node\d+", name)) for name in system.names("sys/devices/system/node")
        ),
        huge_pages=_chosen(system.read(f"{huge}/enabled")),
        huge_page_defrag=_chosen(system.read(f"{huge}/defrag")),
        swap_used_kib=None if swaps is None else sum(map(int, used)),
        limits=read_limits(system),
        pid_max=_whole(system.read("proc/sys/kernel/pid_max")),
        cgroup_pids_max=_pids_max(system),
        core_pattern=system.read("proc/sys/kernel/core_pattern"),
    )


def judge_tuning(tuning: Tuning, *, world_size: int, ranks_per_node: int) -> list[Finding]:
    """Check the settings for a job of `world_size` ranks."""
    return [
        _judge_governor(tuning),
        _judge_numa(tuning),
        _judge_huge_pages(tuning),
        _judge_swap(tuning),
        _judge_files(tuning, world_size),
        _judge_processes(tuning, ranks_per_node),
        _judge_cores(tuning),
    ]


def _governor(system: System, folder: str) -> str:
    governor = system.read(f"{folder}/scaling_governor") or ""
    driver = system.read(f"{folder}/scaling_driver") or ""
    preference = system.read(f"{folder}/energy_performance_preference")
    return f"{governor} ({preference})" if driver in FAST_DRIVERS and preference else governor


def _chosen(text: str | None) -> str | None:
    found = re.search(r"\[(\w[\w+]*)\]", text or "")
    return found[1] if found else None


def _pids_max(system: System) -> int | None:
    """Of the group of this process and of those above it, the least; of cgroup version 2, then 1."""
    text = system.read("proc/self/cgroup") or ""
    found = re.search(r"^0::/(.*)$", text, re.MULTILINE) or re.search(r"^\d+:pids:/(.*)$", text, re.MULTILINE)
    if found is None:
        return None
    root = "sys/fs/cgroup/pids" if ":pids:" in found[0] else "sys/fs/cgroup"
    parts = [part for part in found[1].split("/") if part]
    folders = ["/".join((root, *parts[:depth])) for depth in range(len(parts) + 1)]
    texts = [own for folder in folders if (own := system.read(f"{folder}/pids.max")) is not None]
    limits = [int(own) for own in texts if own.isdigit()]
    return min(limits) if limits else (UNLIMITED if texts else None)


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _judge_governor(tuning: Tuning) -> Finding:
    check = GOVERNOR
    if not tuning.governors:
        return skipped(check, "the kernel does not set frequencies (a virtual machine, or the BIOS does)")
    slow = {
        name: count
        for name, count in tuning.governors.items()
        if not name.startswith("performance") and "(performance)" not in name
    }
    if slow:
        found = ", ".join(f"{name} on {count} CPUs" for name, count in slow.items())
        rule = "performance: ranks start kernels, and a CPU that slows down makes GPUs wait"
        return warned(
            check, found, rule, "cpupower frequency-set --governor performance, at the node's start"
        )
    return passed(check, ", ".join(tuning.governors))


def _judge_numa(tuning: Tuning) -> Finding:
    check = NUMA
    if tuning.numa_balancing is None:
        return skipped(check, "the kernel has none")
    if tuning.numa_balancing != "0" and tuning.num_numa_nodes > 1:
        rule = "0: the kernel interrupts ranks to move their memory, pinned or not"
        remedy = "sysctl kernel.numa_balancing=0, and in /etc/sysctl.d"
        return warned(check, f"kernel.numa_balancing is {tuning.numa_balancing}", rule, remedy)
    return passed(check, "off" if tuning.numa_balancing == "0" else "one NUMA node")


def _judge_huge_pages(tuning: Tuning) -> Finding:
    check = HUGE_PAGES
    folder = "/sys/kernel/mm/transparent_hugepage"
    if tuning.huge_pages is None or tuning.huge_page_defrag is None:
        return skipped(check, f"no {folder}")
    if tuning.huge_pages == "never":
        rule = (
            "always or madvise: optimizer states in host memory are read and written as a whole at each step"
        )
        return warned(check, "enabled is never", rule, f"echo madvise > {folder}/enabled")
    if tuning.huge_page_defrag == "always":
        rule = "not always: each allocation would wait for memory to be compacted"
        return warned(check, "defrag is always", rule, f"echo madvise > {folder}/defrag")
    return passed(check, f"{tuning.huge_pages}, defrag {tuning.huge_page_defrag}")


def _judge_swap(tuning: Tuning) -> Finding:
    check = SWAP
    if tuning.swap_used_kib is None:
        return skipped(check, "no /proc/swaps")
    if tuning.swap_used_kib >= 2**20:
        rule = "less than 1 GiB: memory was short, and what was moved out comes back slowly"
        remedy = "look for leftovers of other jobs; swapoff --all && swapon --all, or no swap"
        return warned(check, f"{tuning.swap_used_kib / 2**20:.1f} GiB used", rule, remedy)
    return passed(check, "hardly used" if tuning.swap_used_kib else "not used")


def _judge_files(tuning: Tuning, world_size: int) -> Finding:
    check = FILES
    limit = tuning.limits.get("Max open files")
    if limit is None:
        return skipped(check, "no /proc/self/limits")
    least = world_size + SPARE_FILES
    found = "any number" if limit == UNLIMITED else f"at most {limit:,}"
    remedy = "ulimit -n 1048576: LimitNOFILE of slurmd, --ulimit nofile of docker, /etc/security/limits.d"
    if limit != UNLIMITED and limit < least:
        rule = f"rank 0 has a connection to each of {world_size:,} ranks, and needs {least:,}"
        return failed(check, found, rule, remedy)
    if limit != UNLIMITED and limit < min(GOOD_FILES, 16 * least):
        return warned(
            check, found, f"{min(GOOD_FILES, 16 * least):,}: shards, sockets and libraries add up", remedy
        )
    return passed(check, found)


def _judge_processes(tuning: Tuning, ranks_per_node: int) -> Finding:
    check = PROCESSES
    limits = {
        "ulimit -u": tuning.limits.get("Max processes"),
        "kernel.pid_max": tuning.pid_max,
        "pids.max of the cgroup": tuning.cgroup_pids_max,
    }
    known = {name: limit for name, limit in limits.items() if limit is not None}
    if not known:
        return skipped(check, "no /proc/self/limits")
    least = PROCESSES_PER_RANK * ranks_per_node
    low = {name: limit for name, limit in known.items() if limit != UNLIMITED and limit < least}
    if low:
        found = ", ".join(f"{name} is {limit:,}" for name, limit in low.items())
        rule = f"{ranks_per_node} ranks with their loaders need {least:,} processes and threads"
        return warned(check, found, rule, "raise it: ulimit -u, sysctl kernel.pid_max, TasksMax of slurmd")
    limited = [limit for limit in known.values() if limit != UNLIMITED]
    return passed(check, f"at least {min(limited):,}" if limited else "any number")


def _judge_cores(tuning: Tuning) -> Finding:
    check = CORES
    limit = tuning.limits.get("Max core file size")
    if limit is None or tuning.core_pattern is None:
        return skipped(check, "no /proc/self/limits or kernel.core_pattern")
    if limit and not tuning.core_pattern.startswith("|"):
        found = f"written to {tuning.core_pattern} in the working folder"
        rule = "a rank that crashes must not write its memory, tens of GB, to the shared disk"
        return warned(check, found, rule, "ulimit -c 0, or a kernel.core_pattern on a local disk")
    return passed(check, "none" if not limit else f"handled by {tuning.core_pattern[1:].split()[0]}")
