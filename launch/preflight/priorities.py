"""How cards map packets to priorities, flow control and buffers: read by mlnx_qos, or by iproute2's dcb.

mlnx_qos comes with NVIDIA's drivers. The kernel's own drivers, of other vendors too, have the same settings
under the standard interface of data center bridging (IEEE 802.1Q), which dcb shows.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from launch.preflight.system import AbsentError, BrokenError, System

UNITS = {"b": 1, "": 1, "kb": 2**10, "mb": 2**20}
"""Units in which dcb prints sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Priorities:
    """How the card of an interface maps packets to its eight priorities."""

    trust: str
    """What determines the priority: `dscp`, or `pcp` for the VLAN tag."""
    by_dscp: Mapping[int, int]
    """DSCP -> priority."""
    lossless: tuple[int, ...]
    """Priorities with flow control."""
    buffers: Mapping[int, int]
    """Priority -> number of its receive buffer; empty if the tool does not show it."""
    buffer_bytes: tuple[int, ...]
    """Size of each receive buffer; empty if the tool does not show it."""


def read_priorities(system: System, interface: str) -> Priorities:
    """Settings of an interface.

    Raises:
        AbsentError: neither tool is installed.
        BrokenError: the tool fails or prints something unexpected.
    """
    try:
        return parse_mlnx_qos(system.run(["mlnx_qos", "-i", interface]), interface)
    except AbsentError:
        pass
    try:
        shown = {what: system.run(["dcb", "-N", what, "show", "dev", interface]) for what in ("app", "pfc")}
    except AbsentError as error:
        tools = "neither mlnx_qos nor dcb is installed: install mlnx-tools, or iproute2 5.11 or later"
        raise AbsentError(tools) from error
    try:
        buffers = system.run(["dcb", "buffer", "show", "dev", interface])
    except BrokenError:
        # Few drivers show their buffers.
        buffers = ""
    return parse_dcb(shown["app"], shown["pfc"], buffers, interface)


def parse_mlnx_qos(text: str, interface: str) -> Priorities:
    """What `mlnx_qos -i` printed. Raises `BrokenError` if it is no such output."""
    trust = re.search(r"Priority trust state:\s*(\w+)", text)
    pfc = re.search(r"PFC configuration:(.*)", text, re.DOTALL)
    rows = dict(re.findall(r"^\s*(enabled|buffer)((?:\s+\d){8})\s*$", pfc[1] if pfc else "", re.MULTILINE))
    # The trust state is "none" if mlnx_qos could not query the card, e.g. for a virtual function.
    if trust is None or trust[1] == "none" or "enabled" not in rows:
        raise BrokenError(f"mlnx_qos -i {interface}: no trust state or PFC configuration in its output")
    mapped = re.findall(r"prio:(\d)\s+dscp:([\d,]+)", text)
    sizes = re.search(r"Receive buffer size \(bytes\):\s*([\d,]+)", text)
    return Priorities(
        trust=trust[1],
        by_dscp={
            int(dscp): int(priority) for priority, listed in mapped for dscp in re.findall(r"\d+", listed)
        },
        lossless=tuple(priority for priority, flag in enumerate(rows["enabled"].split()) if flag == "1"),
        buffers={priority: int(number) for priority, number in enumerate(rows.get("buffer", "").split())},
        buffer_bytes=tuple(int(size) for size in re.findall(r"\d+", sizes[1])) if sizes else (),
    )


def parse_dcb(app: str, pfc: str, buffer: str, interface: str) -> Priorities:
    """What dcb showed of the three objects; `buffer` may be empty. Raises `BrokenError` if `pfc` has no
    flow control."""
    enabled = re.search(r"prio-pfc((?: \d:(?:on|off))+)", pfc)
    if enabled is None:
        raise BrokenError(f"dcb pfc show dev {interface}: no flow control in its output")
    rules = re.search(r"dscp-prio((?: \d+:\d)+)", app)
    mapped = re.findall(r"(\d+):(\d)", rules[1]) if rules else []
    to_buffer = re.search(r"prio-buffer((?: \d:\d)+)", buffer)
    sizes = re.search(r"buffer-size((?: \d:[\d.]+\w*)+)", buffer)
    return Priorities(
        # Drivers trust the DSCP from the first rule for one on, and the VLAN tag without any.
        trust="dscp" if mapped else "pcp",
        by_dscp={int(dscp): int(priority) for dscp, priority in mapped},
        lossless=tuple(int(number) for number, flag in re.findall(r"(\d):(\w+)", enabled[1]) if flag == "on"),
        buffers={int(a): int(b) for a, b in re.findall(r"(\d):(\d)", to_buffer[1])} if to_buffer else {},
        buffer_bytes=tuple(
            int(float(size) * UNITS.get(unit.lower(), 1))
            for size, unit in re.findall(r"\d:([\d.]+)([a-zA-Z]*)", sizes[1] if sizes else "")
        ),
    )
