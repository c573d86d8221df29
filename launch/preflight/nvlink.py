"""NVLink of a node's GPUs: links that are up, errors on them, and whether the GPUs have joined the fabric."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.gpu_state import GpuState
from launch.preflight.system import System

LINKS, ERRORS, FABRIC = NVLINK_CHECKS = ("NVLink links", "NVLink errors", "NVLink fabric")
GPU = re.compile(r"^GPU (\d+):")
RATE = re.compile(r"^\s+Link (\d+): (?:([\d.]+) GB/s|(<?inactive>?.*))$", re.IGNORECASE)
COUNT = re.compile(r"^\s+Link (\d+): (.*\S): (\d+)\s*$")
FAULTY = re.compile(r"(?!FEC\b).*(?:error|fail|discard)", re.IGNORECASE)
"""Counters that should stay at 0; drivers of newer GPUs print others next to them, e.g. of packets, and
`FEC Errors - 0` to 15, of code words by how many of their symbols were corrected."""
SEVERE = re.compile(r"recovery|fail", re.IGNORECASE)
"""Counters of links that broke down, if only for a moment. The others count what was sent again."""
MANY_REPEATED = 1000
"""Repeated packets of a link since the driver was loaded from which it warns. Our choice."""
REPEATED_NOW = 100
"""Repeated packets of a link within the minutes of the measurements from which it fails. Our choice: a few
are how links deal with noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NvLinks:
    """Links of the GPUs by nvidia-smi's index."""

    rates_gb_per_s: Mapping[int, Mapping[int, float]]
    """GPU -> link -> rate; 0 if the link is down."""


def read_links(system: System) -> NvLinks:
    """State of every link.

    Raises:
        AbsentError: nvidia-smi is not installed.
        BrokenError: it fails.
    """
    rates: dict[int, dict[int, float]] = {}
    gpu = 0
    for line in system.run(["nvidia-smi", "nvlink", "--status"]).splitlines():
        if heading := GPU.match(line):
            gpu = int(heading[1])
            rates[gpu] = {}
        elif found := RATE.match(line):
            rates.setdefault(gpu, {})[int(found[1])] = float(found[2] or 0)
    return NvLinks(rates_gb_per_s=rates)


def read_link_errors(system: System) -> dict[str, dict[str, int]]:
    """`GPU 3 link 4` -> name of a counter -> errors since the driver was loaded. Raises as `read_links`."""
    counts: dict[str, dict[str, int]] = {}
    gpu = "0"
    for line in system.run(["nvidia-smi", "nvlink", "--errorcounters"]).splitlines():
        if heading := GPU.match(line):
            gpu = heading[1]
        elif (found := COUNT.match(line)) and FAULTY.match(found[2]):
            counts.setdefault(f"GPU {gpu} link {found[1]}", {})[found[2]] = int(found[3])
    return counts


def judge_links(links: NvLinks, num_gpus: int) -> Finding:
    """Check that all GPUs have as many links, all of one rate."""
    check = LINKS
    up = {gpu: [rate for rate in own.values() if rate] for gpu, own in links.rates_gb_per_s.items()}
    if num_gpus == 1:
        return skipped(check, "one GPU")
    if not any(links.rates_gb_per_s.values()) or len(up) < num_gpus:
        return skipped(check, f"nvidia-smi nvlink --status shows links of {len(up)} of {num_gpus} GPUs")
    usual = Counter(len(rates) for rates in up.values()).most_common(1)[0][0]
    most = max(usual, *(len(rates) for rates in up.values()))
    rates = sorted({rate for own in up.values() for rate in own})
    faults = [f"GPU {gpu}: {len(own)} of {most} links up" for gpu, own in up.items() if len(own) < most]
    faults += [
        f"GPU {gpu} link {link}: {rate:g} of {rates[-1]:g} GB/s"
        for gpu, own in links.rates_gb_per_s.items()
        for link, rate in own.items()
        if rate and rate < rates[-1]
    ]
    if not most:
        faults = ["no link is up"]
    if faults:
        rule = "all GPUs must have as many links, at full speed"
        remedy = "check nvidia-fabricmanager and dmesg for Xid 74; reset all GPUs or reboot; drain the node"
        return failed(check, "; ".join(faults), rule, remedy)
    return passed(check, f"{most} of {rates[-1]:g} GB/s on each of {num_gpus} GPUs")


def judge_link_errors(
    before: Mapping[str, Mapping[str, int]], after: Mapping[str, Mapping[str, int]] | None
) -> Finding:
    """Compare counters before and after the measurements; `after` is None if nothing was measured."""
    check = ERRORS
    if not before:
        return skipped(check, "nvidia-smi nvlink --errorcounters shows none")
    remedy = "reseat or replace what is at both ends: GPU, NVSwitch, baseboard; drain the node"
    # 1. While measuring: no link may break down, and few packets be sent again.
    grown = {
        (link, name): count - before[link][name]
        for link, counts in (after or {}).items()
        for name, count in counts.items()
        if count > before.get(link, {}).get(name, count)
    }
    if grown:
        found = _first([f"{link} {name} +{count:,}" for (link, name), count in grown.items()])
        is_bad = any(
            count >= (1 if SEVERE.search(name) else REPEATED_NOW) for (_, name), count in grown.items()
        )
        rule = f"no link may break down, or send {REPEATED_NOW} packets again, while measuring"
        return (failed if is_bad else warned)(check, found, rule, remedy)
    # 2. Since the driver was loaded: a few repetitions are normal, a link that broke down is not.
    severe = [
        f"{link} {name} {count:,}"
        for link, counts in before.items()
        for name, count in counts.items()
        if count >= (1 if SEVERE.search(name) else MANY_REPEATED)
    ]
    if severe:
        rule = f"no link may break down, or send {MANY_REPEATED:,} packets again, since the driver was loaded"
        return warned(check, _first(severe), rule, remedy)
    num_errors = sum(count for counts in before.values() for count in counts.values())
    while_measuring = ", none while measuring" if after is not None else "; nothing was measured"
    return passed(check, f"{num_errors} on {len(before)} links{while_measuring}")


def judge_fabric(states: Sequence[GpuState]) -> Finding:
    """Check that all GPUs have joined the fabric of the NVSwitches."""
    check = FABRIC
    if all(state.fabric_state is None for state in states):
        return skipped(check, "the GPUs are in none, or the driver does not report it")
    faults = []
    for number, state in enumerate(states):
        if state.fabric_state != "Completed" or state.fabric_status not in ("Success", None):
            words = ", ".join(word for word in (state.fabric_state, state.fabric_status) if word) or "unknown"
            faults.append(f"GPU {number}: {words}")
        faults += [f"GPU {number}: {fault}" for fault in state.fabric_faults]
    if faults:
        rule = "state Completed, status Success, good health; otherwise CUDA fails with error 802"
        remedy = "start nvidia-fabricmanager, of the driver's version, and see its log; drain the node"
        return failed(check, _first(faults), rule, remedy)
    return passed(check, f"all {len(states)} GPUs have joined it")


def _first(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - 8} more" if len(texts) > 8 else ""
    return "; ".join(texts[:8]) + more
