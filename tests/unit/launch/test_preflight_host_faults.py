"""Each fault of a node's kernel, settings, clock or names is named by one check."""

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from launch.preflight.system import AbsentError, BrokenError
from launch.preflight.tuning import FILES, judge_tuning, read_tuning
from tests.helpers.node_faults import (
    BAD,
    PASSED,
    SKIPPED,
    SO_SO,
    Fault,
    adds,
    assert_named,
    both,
    found_by,
    says,
    write,
)
from tests.helpers.recorded_node import LIMITS, RecordedNode, change_output

CPU0 = "sys/devices/system/cpu/cpu0/cpufreq"
HUGE = "sys/kernel/mm/transparent_hugepage"
CGROUP = "sys/fs/cgroup/system.slice/slurmstepd.scope"
TRACKING = "chronyc"


def limit(name: str, value: str) -> str:
    """The limits of a process with another one."""
    lines = LIMITS.format(limit="unlimited").splitlines()
    return "\n".join(f"{name:<25} {value:<20} {value}" if line.startswith(name) else line for line in lines)


def no_log(*_: object) -> object:
    refusal = BrokenError("dmesg: status 1: dmesg: read kernel buffer failed: Operation not permitted")
    return both(says("dmesg", refusal), says("journalctl", AbsentError("journalctl is not installed")))


FAULTS = [
    # The kernel log: what each XID means is in the test of the log.
    Fault(
        "XID",
        adds("dmesg", "[2591000.1] NVRM: Xid (PCI:0000:3a:00): 79, pid=771, GPU has fallen off the bus."),
        "XID", BAD, ("XID 79 (GPU has fallen off the bus) on 0000:3a:00 0.3 h ago", "drain and reboot"),
    ),
    Fault(
        "SXid",
        adds("dmesg", "[2591000.1] nvidia-nvswitch0: SXid (PCI:0000:05:00.0): 20034, Fatal, Link 3 Fault Up"),
        "SXid", BAD, ("SXid 20034 on nvidia-nvswitch0", "nvidia-fabricmanager"),
    ),
    Fault(
        "bad memory",
        adds("dmesg", "[2591000.1] EDAC MC0: 1 UE memory read error on CPU_SrcID#0_MC#0_Chan#1_DIMM#0"),
        "kernel errors", BAD, ("uncorrected memory error", "DIMM#0"),
    ),
    Fault(
        "no log at all", no_log(), "XID", SKIPPED,
        ("Operation not permitted", "journalctl is not installed"),
    ),
    Fault(
        "an empty log", both(says("dmesg", "\n"), says("journalctl", "-- No entries --\n")),
        "kernel errors", SKIPPED, ("dmesg prints nothing",),
    ),
    # Settings.
    Fault(
        "powersave", write(f"{CPU0}/scaling_governor", "powersave\n"), "CPU governor", SO_SO,
        ("powersave on 1 CPUs", "cpupower"),
    ),
    Fault(
        "pstate that saves power",
        both(
            write(f"{CPU0}/scaling_governor", "powersave\n"),
            write(f"{CPU0}/scaling_driver", "intel_pstate\n"),
            write(f"{CPU0}/energy_performance_preference", "balance_power\n"),
        ),
        "CPU governor", SO_SO, ("powersave (balance_power) on 1 CPUs",),
    ),
    Fault(
        "NUMA balancing", write("proc/sys/kernel/numa_balancing", "1\n"), "NUMA balancing", SO_SO,
        ("kernel.numa_balancing is 1",),
    ),
    Fault(
        "no huge pages", write(f"{HUGE}/enabled", "always madvise [never]\n"), "huge pages", SO_SO,
        ("enabled is never",),
    ),
    Fault(
        "compaction", write(f"{HUGE}/defrag", "[always] defer defer+madvise madvise never\n"), "huge pages",
        SO_SO, ("defrag is always",),
    ),
    Fault(
        "swap",
        write("proc/swaps", "Filename Type Size Used Priority\n/dev/md1 partition 67108860 8388608 -2\n"),
        "swap", SO_SO, ("8.0 GiB used",),
    ),
    Fault(
        "1,024 files", write("proc/self/limits", limit("Max open files", "1024")), "open files", BAD,
        ("at most 1,024", "256 ranks, and needs 1,152"),
    ),
    Fault(
        "4,096 files", write("proc/self/limits", limit("Max open files", "4096")), "open files", SO_SO,
        ("at most 4,096", "18,432"),
    ),
    Fault(
        "few processes", write("proc/self/limits", limit("Max processes", "4096")), "processes", SO_SO,
        ("ulimit -u is 4,096", "8,000"),
    ),
    Fault(
        "few in the cgroup", write(f"{CGROUP}/pids.max", "512\n"), "processes", SO_SO,
        ("pids.max of the cgroup is 512",),
    ),
    Fault(
        "small pid_max", write("proc/sys/kernel/pid_max", "4096\n"), "processes", SO_SO,
        ("kernel.pid_max is 4,096",),
    ),
    Fault(
        "core dumps",
        both(
            write("proc/self/limits", limit("Max core file size", "unlimited")),
            write("proc/sys/kernel/core_pattern", "core\n"),
        ),
        "core dumps", SO_SO, ("written to core",),
    ),
    Fault(
        "no shm", write("proc/mounts", "/dev/md0 / ext4 rw 0 0\n"), "/dev/shm", BAD,
        ("no file system of its own",),
    ),
    Fault(
        "no limits", lambda node: (node.root / "proc/self/limits").unlink(), "pinned memory", SKIPPED,
        ("no /proc/self/limits",),
    ),
    # The clock.
    Fault(
        "clock not set",
        change_output(TRACKING, "Leap status     : Normal", "Leap status     : Not synchronised"),
        "clock source", SO_SO, ("not synchronised",),
    ),
    Fault(
        "own clock",
        change_output(TRACKING, "0A000002 (10.0.0.2)", "7F7F0101 ()"),
        "clock source", SO_SO, ("stratum 10", "only has its own clock"),
    ),
    Fault(
        "clock off", change_output(TRACKING, "0.000008925 seconds slow", "3.250000000 seconds slow"),
        "clock source", SO_SO, ("off by -3.250 s", "makestep"),
    ),
    Fault(
        "no time service",
        both(says(TRACKING, BrokenError("chronyc -n tracking: status 1: 506 Cannot talk to daemon"))),
        "clock source", SKIPPED,
        ("506 Cannot talk to daemon; ntpq is not installed; timedatectl is not installed",),
    ),
    Fault(
        "timesyncd without a server",
        both(
            says(TRACKING, AbsentError("chronyc is not installed")),
            says("timedatectl show", "Timezone=UTC\nNTP=yes\nNTPSynchronized=no\n"),
        ),
        "clock source", SO_SO, ("systemd: not synchronised",),
    ),
    Fault(
        "ntpd with its own clock",
        both(
            says(TRACKING, AbsentError("chronyc is not installed")),
            says("ntpq", "associd=0 status=0515,\nstratum=6, refid=LOCAL, offset=+0.000, leap=00\n"),
        ),
        "clock source", SO_SO, ("ntpd of LOCAL, stratum 10",),
    ),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_named(fault: Fault, recorded: RecordedNode, config: Config) -> None:
    assert_named(fault, recorded, config)


def test_a_governor_that_lets_the_hardware_choose(recorded: RecordedNode, config: Config) -> None:
    for name, text in (
        ("scaling_governor", "powersave"),
        ("scaling_driver", "amd-pstate-epp"),
        ("energy_performance_preference", "performance"),
    ):
        write(f"{CPU0}/{name}", f"{text}\n")(recorded)
    assert found_by("CPU governor", recorded, config).verdict is PASSED


def test_the_usual_limit_of_a_shell_is_enough_for_one_node(recorded: RecordedNode) -> None:
    recorded.write("proc/self/limits", f"{'Max open files':<26}{1024:<21}{1048576:<21}files\n")
    tuning = read_tuning(recorded.system)
    verdicts = [
        one.verdict
        for world_size in (8, 16, 4096)
        for one in judge_tuning(tuning, world_size=world_size, ranks_per_node=8)
        if one.check == FILES
    ]
    assert verdicts == [SO_SO, SO_SO, BAD]


def test_open_files_follow_from_the_size_of_the_job(recorded: RecordedNode) -> None:
    """Rank 0 of 4,096 has as many connections."""
    write("proc/self/limits", limit("Max open files", "4096"))(recorded)
    large = ["cluster.nodes=512", "parallelism.pp=16", "train.global_batch_size=8192"]
    own = found_by("open files", recorded, compose(["experiment=k25_pretrain_4k", *large]))
    assert own.verdict is BAD and "4,096 ranks, and needs 4,992" in own.rule


def test_timesyncd_tells_its_server(recorded: RecordedNode, config: Config) -> None:
    says(TRACKING, AbsentError("chronyc is not installed"))(recorded)
    message = "NTPMessage={ Leap=0, Version=4, Mode=4, Stratum=2, Precision=-25 }"
    says("timedatectl show-timesync", f"ServerName=ntp.example.org\nServerAddress=10.0.0.2\n{message}\n")(
        recorded
    )
    says("timedatectl show", "NTP=yes\nNTPSynchronized=yes\n")(recorded)
    assert found_by("clock source", recorded, config).found == "timesyncd of ntp.example.org, stratum 2"
