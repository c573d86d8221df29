"""The kernel log: errors of GPUs (XID), NVSwitches (SXid), memory, CPU, PCIe and disks since the start."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from launch.preflight.system import AbsentError, BrokenError, System
from launch.preflight.xids import RECOVERY_ACTION

XID, SXID, HARDWARE = LOG_CHECKS = ("XID", "SXid", "kernel errors")
COMMANDS = (
    ("dmesg",),
    ("journalctl", "--dmesg", "--boot", "--output=short-monotonic", "--no-pager", "--quiet"),
)
"""Ways to the log. dmesg has what fits into the kernel's buffer; many nodes allow it to root only."""
MANY_CORRECTED = 100
"""Corrected errors of memory or PCIe since the start from which they warn. Our choice."""
AT_START_S = 120.0
"""A log whose first line is younger than the start by no more than this holds everything since then."""

LINE = re.compile(r"^\[\s*(\d+\.\d+)\](?:\[[^]]*\])? (?:\S+ kernel: )?(.*)$")
XID_TEXT = re.compile(r"NVRM: (?:\S+ )?Xid \((?:PCI:)?([0-9A-Fa-f:.]+)\): (\d+),?\s*(.*)")
SXID_TEXT = re.compile(r"(nvidia-nvswitch\d+): SXid \(PCI:[0-9A-Fa-f:.]+\): (\d+),\s*(.*)")
LOADED = "NVRM: loading NVIDIA"
"""Start of the line that the driver writes when it is loaded, which resets GPUs."""

FATAL, MILD = "fatal", "mild"
HARDWARE_TEXTS: tuple[tuple[str, str, str, int], ...] = (
    (
        FATAL,
        "uncorrected memory error",
        r"EDAC \w+: \d+ UE |Uncorrected hardware memory error|Memory failure: 0x",
        1,
    ),
    (
        FATAL,
        "machine check",
        r"\[Hardware Error\]: (?:Uncorrected error|event severity: (?:fatal|recoverable))",
        1,
    ),
    (FATAL, "machine check", r"Kernel panic|mce: Memory error not recovered", 1),
    (FATAL, "fatal PCIe error", r"(?:AER: .*|severity=)Uncorrect\w+ \(Fatal\)|DPC: containment event", 1),
    (FATAL, "GPU does not start", r"NVRM: .*(?:RmInitAdapter|rm_init_adapter) failed", 1),
    (FATAL, "file system became read-only", r"Remounting filesystem read-only", 1),
    (MILD, "PCIe error", r"(?:AER: .*|severity=)Uncorrect\w+ \(Non-Fatal\)", 1),
    (MILD, "disk error", r"(?:I/O error, dev|critical medium error, dev) (?!loop|sr)\w+", 1),
    (MILD, "CPU stuck", r"(?:soft lockup|rcu_\w+ (?:self-)?detected stall|hard LOCKUP)", 1),
    (MILD, "task blocked", r"INFO: task \S+ blocked for more than", 1),
    (MILD, "out of memory", r"(?:Out of memory|Memory cgroup out of memory): Killed process", 1),
    (
        MILD,
        "corrected memory errors",
        r"EDAC \w+: \d+ CE |\[Hardware Error\]: Corrected error",
        MANY_CORRECTED,
    ),
    (MILD, "corrected PCIe errors", r"AER: (?:Multiple )?Correct(?:ed|able) error", MANY_CORRECTED),
)
"""How bad it is, meaning, pattern, and the least number of lines for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Equal errors of one device, told by the newest of them."""

    check: str
    """`XID`, `SXid` or `kernel errors`."""
    code: int
    """Number of an XID or SXid; row of the table of hardware errors."""
    place: str
    """PCI address of a GPU, or name of an NVSwitch; empty for other hardware."""
    text: str
    """What the log says, shortened."""
    count: int
    age_s: float | None
    """Time since then; None if the log has no times."""
    is_before_reload: bool
    """Whether the driver was loaded again since then, or said that the GPU needs nothing any more."""

    @property
    def needs_nothing(self) -> bool:
        """Whether this is the driver's word that a GPU has recovered."""
        return self.code == RECOVERY_ACTION and self.text.rstrip(".) ").endswith("(None")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelLog:
    """What the log has of errors."""

    covered_s: float | None
    """How far it reaches back; None if that is unknown or to the start."""
    events: tuple[Event, ...]


def read_kernel_log(system: System) -> KernelLog:
    """Errors in the log. Raises `BrokenError` if it cannot be read at all."""
    up_s = read_uptime(system)
    texts, reasons = [], []
    for command in COMMANDS:
        try:
            text = system.run(command)
        except (AbsentError, BrokenError) as error:
            reasons.append(str(error))
            continue
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("-- ")]
        if lines:
            texts.append(lines)
            if _start_of(lines) <= AT_START_S:
                break
        else:
            reasons.append(f"{command[0]} prints nothing")
    if not texts:
        raise BrokenError("; ".join(reasons))
    lines = min(texts, key=_start_of)
    start_s = _start_of(lines)
    covered_s = None if up_s is None or start_s <= AT_START_S else up_s - start_s
    return KernelLog(covered_s=covered_s, events=tuple(_events(lines, up_s)))


def read_uptime(system: System) -> float | None:
    """Seconds since the node was started."""
    found = re.match(r"\d+(\.\d+)?", system.read("proc/uptime") or "")
    return float(found[0]) if found else None


def _events(lines: Iterable[str], up_s: float | None) -> list[Event]:
    found: dict[tuple[str, int, str], Event] = {}
    for line in lines:
        timed = LINE.match(line)
        text = timed[2] if timed else line
        if LOADED in text:
            found = {key: replace(event, is_before_reload=True) for key, event in found.items()}
        parts = _parts(text)
        if parts is None:
            continue
        age_s = max(0.0, up_s - float(timed[1])) if timed and up_s is not None else None
        check, code, place, words = parts
        key = (check, code, place)
        old = found.get(key)
        # SXids are followed by lines of data, without the word that says how bad they are.
        if old is not None and check == SXID and not words.startswith(("Fatal", "Non-fatal")):
            continue
        count = 1 if old is None or old.is_before_reload else old.count + 1
        found[key] = Event(
            check=check,
            code=code,
            place=place,
            text=words[:160],
            count=count,
            age_s=age_s,
            is_before_reload=False,
        )
    return _without_recovered(found)


def _without_recovered(found: Mapping[tuple[str, int, str], Event]) -> list[Event]:
    """The events; those of a GPU that the driver later says needs nothing are over."""
    well = {
        place: event.age_s
        for (check, code, place), event in found.items()
        if check == XID and event.needs_nothing
    }
    return [
        replace(event, is_before_reload=True)
        if event.check == XID and event.place in well and (event.age_s or 0) > (well[event.place] or 0)
        else event
        for event in found.values()
    ]


def _parts(text: str) -> tuple[str, int, str, str] | None:
    """Check, code, place and words of a line that tells of an error."""
    if found := XID_TEXT.search(text):
        return XID, int(found[2]), found[1], found[3]
    if found := SXID_TEXT.search(text):
        return SXID, int(found[2]), found[1], found[3]
    for code, (_, _, pattern, _) in enumerate(HARDWARE_TEXTS):
        if re.search(pattern, text):
            return HARDWARE, code, "", text
    return None


def _start_of(lines: Sequence[str]) -> float:
    """Time of the first line in seconds since the start; 0 if lines have no times."""
    first = next((found for line in lines if (found := LINE.match(line))), None)
    return float(first[1]) if first else 0.0
