"""The kernel log: which errors of GPUs, NVSwitches and hardware fail a node, which warn, and until when."""

import pytest

from launch.preflight.findings import Finding, Verdict
from launch.preflight.kernel_log import read_kernel_log
from launch.preflight.kernel_verdicts import judge_kernel_log
from launch.preflight.system import BrokenError
from launch.preflight.xids import PROGRAMS, REBOOT, RESET, WARNED
from tests.helpers.node_faults import BAD, PASSED, SO_SO
from tests.helpers.recorded_node import RecordedNode

UP_S = 30 * 86_400.25
START = "[    0.000000] Linux version 6.8.0-60-generic\n"
JOURNAL = "journalctl --dmesg"
RESET_NEEDED = "GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)"
WELL = "GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)"


def at(age_s: float, text: str) -> str:
    return f"[{UP_S - age_s:12.6f}] {text}\n"


def xid(code: int, text: str = "pid=771, name=python", age_s: float = 3600.0, bus: str = "0000:3a:00") -> str:
    return at(age_s, f"NVRM: Xid (PCI:{bus}): {code}, {text}")


def judged(recorded: RecordedNode, lines: str, start: str = START) -> dict[str, Finding]:
    """Check -> finding on a log of these lines."""
    recorded.outputs["dmesg"] = start + lines
    log = read_kernel_log(recorded.system)
    return {finding.check: finding for finding in judge_kernel_log(log, has_gpus=True)}


@pytest.mark.parametrize(
    ("codes", "verdict"),
    [
        ((46, 48, 62, 64, 74, 95, 109, 119, 120, 140, 143, 155), BAD),
        ((79, 167), BAD),
        ((63, 92, 94, 121), SO_SO),
        ((999,), SO_SO),
        ((8, 13, 31, 43, 45, 68), PASSED),
    ],
)
def test_what_an_xid_says_of_the_node(
    recorded: RecordedNode, codes: tuple[int, ...], verdict: Verdict
) -> None:
    for code in codes:
        own = judged(recorded, xid(code))["XID"]
        assert own.verdict is verdict, str(own)
        assert str(code) in own.found


def test_each_xid_is_of_one_kind() -> None:
    kinds = (set(RESET), set(REBOOT), set(WARNED), set(PROGRAMS))
    assert sum(map(len, kinds)) == len(set().union(*kinds))


@pytest.mark.parametrize(
    ("code", "text", "verdict"),
    [
        (154, RESET_NEEDED, BAD),
        (154, "GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)", BAD),
        (154, "GPU recovery action changed from 0x0 (None) to 0x4 (Drain P2P)", BAD),
        (154, WELL, PASSED),
        (144, "SAW_MVB Nonfatal XC0 i0 Link 0 (0x00000001 0x00000008)", SO_SO),
        (149, "NETIR_LINK_EVT Fatal XC0 i0 Link 00 (0x026001c6 0x00000000)", BAD),
    ],
)
def test_xids_whose_text_decides(recorded: RecordedNode, code: int, text: str, verdict: Verdict) -> None:
    assert judged(recorded, xid(code, text))["XID"].verdict is verdict


def test_old_errors_warn_and_so_do_those_before_the_driver_was_loaded_again(recorded: RecordedNode) -> None:
    loaded = at(1800.0, "NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  580.95.05")
    assert judged(recorded, xid(79, age_s=5 * 86_400))["XID"].verdict is SO_SO
    assert judged(recorded, xid(79) + loaded)["XID"].verdict is SO_SO
    assert judged(recorded, xid(79) + loaded + xid(79, age_s=60.0))["XID"].verdict is BAD


def test_a_gpu_that_has_recovered_warns_and_another_still_fails(recorded: RecordedNode) -> None:
    over = xid(119, age_s=900.0) + xid(154, RESET_NEEDED, age_s=890.0) + xid(154, WELL, age_s=60.0)
    assert judged(recorded, over)["XID"].verdict is SO_SO
    other = judged(recorded, over + xid(119, age_s=30.0, bus="0000:9b:00"))["XID"]
    assert other.verdict is BAD and "0000:9b:00" in other.found and "0000:3a:00" not in other.found


def test_many_errors_are_told_in_a_line(recorded: RecordedNode) -> None:
    lines = "".join(xid(74, age_s=3600.0 - i, bus=f"0000:{i % 8:02x}:00") for i in range(80))
    own = judged(recorded, lines)["XID"]
    assert "XID 74 (NVLink error) on 0000:00:00 10 times, last 1.0 h ago" in own.found
    assert own.found.endswith("and 4 more")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("12028, Non-fatal, Link 32 egress non-posted PRIV error (First)", SO_SO),
        ("24007, Fatal, Link 28 sourcetrack timeout error (First)", BAD),
        ("22013, Non-fatal, Link 60 Minion Link DLREQ interrupt", PASSED),
        # The first line is overwritten, only the data are left.
        ("23001, Data {0x000001c0, 0x00bd5c8a}", BAD),
        ("20009, Severity 0 Engine instance 04 Sub-engine instance 00", SO_SO),
    ],
)
def test_sxids(recorded: RecordedNode, text: str, verdict: Verdict) -> None:
    own = judged(recorded, at(60.0, f"nvidia-nvswitch1: SXid (PCI:0000:84:00.0): {text}"))["SXid"]
    assert own.verdict is verdict, str(own)


@pytest.mark.parametrize(
    ("text", "count", "verdict"),
    [
        ("EDAC MC0: 1 CE memory read error on CPU_SrcID#0_MC#0_Chan#1_DIMM#0", 5, PASSED),
        ("EDAC MC0: 1 CE memory read error on CPU_SrcID#0_MC#0_Chan#1_DIMM#0", 500, SO_SO),
        ("mce: Uncorrected hardware memory error in user-access at af34214200", 1, BAD),
        ("{2}[Hardware Error]: event severity: fatal", 1, BAD),
        (
            "pcieport 0000:0c:00.0: AER: Uncorrectable (Fatal) error message received from 0000:0c:00.0",
            1,
            BAD,
        ),
        ("pcieport 0000:0c:00.0: AER: Uncorrected (Non-Fatal) error received: 0000:0c:00.0", 1, SO_SO),
        ("pcieport 0000:0c:00.0: AER: Multiple Corrected error received: 0000:0c:00.0", 500, SO_SO),
        ("NVRM: GPU 0000:3a:00.0: RmInitAdapter failed! (0x62:0x40:1860)", 1, BAD),
        ("I/O error, dev nvme0n1, sector 2048 op 0x0:(READ)", 1, SO_SO),
        ("I/O error, dev loop3, sector 0 op 0x0:(READ)", 1, PASSED),
        ("EXT4-fs (md0): Remounting filesystem read-only", 1, BAD),
        ("watchdog: BUG: soft lockup - CPU#5 stuck for 22s! [kworker/5:1:88]", 1, SO_SO),
        ("INFO: task python:4411 blocked for more than 120 seconds.", 1, SO_SO),
        ("Memory cgroup out of memory: Killed process 51807 (python) total-vm:412192kB", 1, SO_SO),
        ("pcieport 0000:15:01.0: AER: enabled with IRQ 33", 1, PASSED),
    ],
)
def test_hardware_errors(recorded: RecordedNode, text: str, count: int, verdict: Verdict) -> None:
    own = judged(recorded, at(60.0, text) * count)["kernel errors"]
    assert own.verdict is verdict, str(own)


@pytest.mark.parametrize(
    "line",
    [
        "[Sun Nov 22 16:24:18 2026] NVRM: Xid (PCI:0000:9b:00): 79, GPU has fallen off the bus.\n",
        "NVRM: Xid (PCI:0000:9b:00): 79, GPU has fallen off the bus.\n",
        f"[{UP_S - 60:.6f}][ T1234] NVRM: Xid (PCI:0000:9b:00): 79, GPU has fallen off the bus.\n",
        f"[{UP_S - 60:.6f}] NVRM: GPU0 Xid (0000:9b:00): 79, GPU has fallen off the bus.\n",
    ],
    ids=["wall clock", "no times", "with the caller", "older driver"],
)
def test_other_forms_of_a_line(recorded: RecordedNode, line: str) -> None:
    assert judged(recorded, line)["XID"].verdict is BAD


def test_a_log_whose_start_is_overwritten_says_how_far_it_reaches(recorded: RecordedNode) -> None:
    recorded.outputs[JOURNAL] = BrokenError("journalctl: status 1: No journal files were found.")
    kept = "".join(at(7200.0 - i, "audit: backlog limit exceeded") for i in range(100))
    own = judged(recorded, kept, start="")["XID"]
    assert (own.verdict, own.found) == (PASSED, "none in the last 2.0 h that are kept")
    # The journal has what the kernel has lost, in another form.
    recorded.outputs[JOURNAL] = START + at(
        90_000.0, "node-1 kernel: NVRM: Xid (PCI:0000:9b:00): 79, GPU lost"
    )
    own = judged(recorded, kept, start="")["XID"]
    assert own.verdict is BAD and "25.0 h ago" in own.found
