"""What a node's kernel says of processes that it ended and of hardware that failed, in /dev/kmsg.

Lines are classified here, on the node, so that only those that matter travel. Which XIDs mean hardware is by
NVIDIA's catalog: those whose remedy is a reset of the GPU or support, not a correction of the program.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

KMSG = Path("/dev/kmsg")
MAX_MESSAGES = 20
"""Lines of an attempt that are kept: a broken device repeats itself."""
_LINE_BYTES = 8192
"""Longer than any record of the kernel."""
HARDWARE_XIDS = frozenset(
    (48, 62, 63, 64, 74, 79, 92, 94, 95, 110, 119, 120, 121, 123, 136, 140, 143, 149, 154)
)

KINDS: Mapping[str, Sequence[re.Pattern[str]]] = {
    "out_of_memory": (re.compile(r"[Oo]ut of memory: Kill(?:ed)? process (?P<pid>\d+)"),),
    "xid": (
        re.compile(r"NVRM: Xid \([^)]*\): (?P<xid>\d+)"),
        re.compile(r"NVRM: GPU [^ ]* GPU has fallen off the bus"),
    ),
    "machine": (
        # Bit 61 of the bank's status says that the error was not corrected.
        re.compile(r"mce: \[Hardware Error\]: .*Machine [Cc]heck(?: Exception)?: \w+ Bank \d+: [abefABEF]"),
        re.compile(r"\[Hardware Error\]: .*(?:Uncorrected|uncorrectable|fatal)", re.IGNORECASE),
        re.compile(r"EDAC .*\bUE\b"),
        re.compile(r"AER: .*[Uu]ncorrect"),
        re.compile(r"watchdog: BUG: soft lockup|Watchdog detected hard LOCKUP"),
    ),
    "disk": (
        # Not of a drive without a medium, such as the virtual one of a board's controller.
        re.compile(r"I/O error, dev (?!sr\d|fd\d|loop\d)\S+"),
        re.compile(r"(?:EXT4-fs|BTRFS|XFS) .*(?:error|corrupt|[Ss]hutting down)"),
        re.compile(r"Remounting filesystem read-only"),
        re.compile(r"nvme\S*: .*(?:controller is down|timeout, (?:reset|abort|disable)|Removing after)"),
        re.compile(r"nfs: server \S+ not responding"),
        re.compile(r"LustreError: .*(?:evicted|Connection to \S+ .*lost)"),
    ),
    "link": (
        re.compile(r"mlx5_core \S+ .*: Link down"),
        re.compile(r"mlx5_core .*(?:health compromised|device's health)"),
        re.compile(r"NIC Link is Down"),
        re.compile(r"link status definitely down for interface"),
    ),
}  # fmt: skip
"""Kind -> what lines of that kind look like."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the kernel that matters."""

    kind: str
    text: str
    pid: int | None = None


def classify(text: str) -> Line | None:
    """What a line of the kernel means; None if it says nothing about who is at fault."""
    for kind, patterns in KINDS.items():
        for pattern in patterns:
            match = pattern.search(text)
            if match is None:
                continue
            found = match.groupdict()
            if "xid" in found and int(found["xid"]) not in HARDWARE_XIDS:
                return None
            return Line(kind, text[:300], int(found["pid"]) if "pid" in found else None)
    return None


def lines_since(boot_s: float, path: Path = KMSG) -> Iterator[Line]:
    """Lines that matter from `boot_s` on, in seconds since the machine started.

    Raises OSError if the kernel's log cannot be read: without privileges, or in a container.
    """
    for at_s, text in _records(path):
        if at_s >= boot_s and (line := classify(text)) is not None:
            yield line


def _records(path: Path) -> Iterator[tuple[float, str]]:
    """Time and text of every record: `priority,number,microseconds,flags;text`, and lines of details."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        while True:
            try:
                record = os.read(descriptor, _LINE_BYTES)
            except BlockingIOError:
                return
            except BrokenPipeError:
                # The oldest records were overwritten meanwhile: the next read goes on behind the gap.
                continue
            if not record:
                return
            for line in record.decode("utf-8", "replace").splitlines():
                head, separator, text = line.partition(";")
                fields = head.split(",")
                if separator and len(fields) >= 3 and fields[2].isdecimal():
                    yield int(fields[2]) / 1e6, text
    finally:
        os.close(descriptor)
