"""What sets a node's clock: chrony, systemd's timesyncd, or ntpd."""

import re
from dataclasses import dataclass

from launch.preflight.findings import Finding, passed, skipped, warned
from launch.preflight.system import AbsentError, BrokenError, Missing, System

SOURCE = "clock source"
LOCAL_STRATUM = 10
"""Stratum from which a server only has its own clock: the default of chrony's `local`."""
MAX_STRATUM = 16
"""Stratum of a clock that is not set."""
MAX_OFFSET_S = 0.1
"""Offset from the server that should be corrected by now. Our choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockSource:
    """What a time service says of itself; None for what it does not say."""

    service: str
    is_synchronised: bool | None
    server: str
    stratum: int | None
    """Distance from a reference clock, which has 0."""
    offset_s: float | None


def read_clock_source(system: System) -> ClockSource:
    """Of the first service that answers. Raises `BrokenError` if none does."""
    reasons = []
    for read in (_chrony, _ntpd, _systemd):
        try:
            return read(system)
        except (AbsentError, BrokenError) as error:
            reasons.append(str(error))
    raise BrokenError("; ".join(reasons))


def judge_clock_source(source: ClockSource | Missing) -> Finding:
    """Check that a server sets the clock, not the node itself."""
    if isinstance(source, Missing):
        return skipped(SOURCE, source.reason)
    server = f" of {source.server}" if source.server else ""
    stratum = "" if source.stratum is None else f", stratum {source.stratum}"
    found = f"{source.service}{server}{stratum}"
    remedy = "see chronyc sources, timedatectl or ntpq -pn; give all nodes the same servers"
    if source.is_synchronised is False or (source.stratum or 0) >= MAX_STRATUM:
        return warned(SOURCE, f"{source.service}: not synchronised", "a server must set the clock", remedy)
    if source.stratum is not None and source.stratum >= LOCAL_STRATUM:
        rule = f"a stratum below {LOCAL_STRATUM}: this server only has its own clock"
        return warned(SOURCE, found, rule, remedy)
    if source.offset_s is not None and abs(source.offset_s) > MAX_OFFSET_S:
        rule = f"within {1e3 * MAX_OFFSET_S:g} ms of its server"
        return warned(SOURCE, f"{found}, off by {source.offset_s:.3f} s", rule, f"chronyc makestep; {remedy}")
    if source.is_synchronised is None:
        return skipped(SOURCE, f"{source.service} does not say whether the clock is synchronised")
    return passed(SOURCE, found)


def _chrony(system: System) -> ClockSource:
    text = system.run(["chronyc", "-n", "tracking"])
    values = dict(re.findall(r"^([\w ()]*\w\)?)\s*: (.*)$", text, re.MULTILINE))
    leap, stratum = values.get("Leap status"), values.get("Stratum", "")
    if leap is None or not stratum.strip().isdigit():
        raise BrokenError(f"chronyc tracking: {' '.join(text.split())[:100]!r}")
    reference = re.match(r"([0-9A-F]{8}) \((.*)\)", values.get("Reference ID", ""))
    offset = re.match(r"([\d.]+) seconds (slow|fast)", values.get("System time", ""))
    # An address of loopback means the node's own clock.
    is_own = reference is not None and reference[1].startswith("7F7F")
    return ClockSource(
        service="chrony",
        is_synchronised=leap.strip() != "Not synchronised" and stratum.strip() != "0",
        server=reference[2] if reference else "",
        stratum=max(int(stratum), LOCAL_STRATUM) if is_own else int(stratum),
        offset_s=float(offset[1]) * (-1 if offset[2] == "slow" else 1) if offset else None,
    )


def _ntpd(system: System) -> ClockSource:
    text = system.run(["ntpq", "-n", "-c", "readvar 0 stratum,refid,offset,leap"])
    values = dict(re.findall(r"(\w+)=\"?([^,\"\s]+)", text))
    if not values.get("stratum", "").isdigit():
        raise BrokenError(f"ntpq: {' '.join(text.split())[:100]!r}")
    offset = values.get("offset", "")
    is_own = values.get("refid") in ("LOCAL", "LOCL", "127.127.1.0")
    stratum = int(values["stratum"])
    return ClockSource(
        service="ntpd",
        is_synchronised=values.get("leap") not in ("11", "3") and stratum < MAX_STRATUM,
        server=values.get("refid", ""),
        stratum=max(stratum, LOCAL_STRATUM) if is_own else stratum,
        offset_s=float(offset) / 1e3 if re.fullmatch(r"[+-]?\d+(\.\d+)?", offset) else None,
    )


def _systemd(system: System) -> ClockSource:
    """systemd also tells whether the kernel's clock is synchronised by any other service."""
    values = dict(re.findall(r"^(\w+)=(.*)$", system.run(["timedatectl", "show"]), re.MULTILINE))
    if "NTPSynchronized" not in values:
        raise BrokenError("timedatectl show does not say whether the clock is synchronised")
    try:
        more = system.run(["timedatectl", "show-timesync"])
    except (AbsentError, BrokenError):
        more = ""
    stratum = re.search(r"\bStratum=(\d+)", more)
    server = re.search(r"^ServerName=(.+)$", more, re.MULTILINE)
    return ClockSource(
        service="timesyncd" if server else "systemd",
        is_synchronised=values["NTPSynchronized"] == "yes",
        server=server[1] if server else "",
        stratum=int(stratum[1]) if stratum else None,
        offset_s=None,
    )
