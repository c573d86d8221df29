"""What nodes are made of, which should be the same on all of them: GPUs, links, CPUs, memory."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from k25_train.units import GIB
from launch.preflight.accelerators import Accelerators
from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.gpus import Gpu
from launch.preflight.host import Host
from launch.preflight.system import Missing, System

TRAITS = "alike nodes"
SLOWER = ("GPUs", "GPU memory", "NVLinks")
"""Traits without which a node is slower than the others, or holds less: it fails."""
MEMORY_STEP_GIB = 32
"""Granularity in which memory sizes are compared: firmware does not reserve the same on all nodes."""


def read_traits(system: System, host: Host, own: Accelerators) -> dict[str, str]:
    """Name of a trait -> value; without those that the node does not show."""
    info = system.read("proc/cpuinfo") or ""
    found: dict[str, str] = {}
    if model := re.search(r"^model name\s*:\s*(.*\S)", info, re.MULTILINE):
        found["CPUs"] = f"{len(re.findall(r'^processor', info, re.MULTILINE))} x {model[1]}"
    if host.memory_bytes is not None:
        steps = round(host.memory_bytes / GIB / MEMORY_STEP_GIB)
        found["memory"] = f"about {steps * MEMORY_STEP_GIB:,} GiB"
    if not isinstance(own.gpus, Missing):
        kinds = Counter(gpu.name for gpu in own.gpus)
        found["GPUs"] = " + ".join(f"{count} x {name}" for name, count in sorted(kinds.items()))
        found["GPU memory"] = _listed(map(_whole_gib, own.gpus)) + " GiB"
    if not isinstance(own.states, Missing):
        found["GPU power cap"] = _listed(state.power_limit_w for state in own.states) + " W"
        found["GPU clock"] = _listed(state.max_clock_mhz for state in own.states) + " MHz"
    if not isinstance(own.links, Missing) and own.links.rates_gb_per_s:
        up = (sum(map(bool, rates.values())) for rates in own.links.rates_gb_per_s.values())
        found["NVLinks"] = _listed(up)
    return found


def judge_traits(traits: Mapping[str, Mapping[str, str]]) -> dict[str, Finding]:
    """Node -> finding on its traits, compared with those of most nodes."""
    if len(traits) < 2:
        return {node: skipped(TRAITS, "a single node has nothing to be compared with") for node in traits}
    names = sorted({name for own in traits.values() for name in own})
    usual = {name: _most(own[name] for own in traits.values() if name in own) for name in names}
    findings = {}
    for node, own in traits.items():
        odd = {name: value for name, value in own.items() if value != usual[name]}
        if odd:
            found = ", ".join(f"{name} {value}" for name, value in odd.items())
            rule = f"most nodes have {', '.join(f'{name} {usual[name]}' for name in odd)}"
            remedy = "the slowest node sets the pace: repair its parts or settings, or leave it out"
            findings[node] = (failed if set(odd) & set(SLOWER) else warned)(TRAITS, found, rule, remedy)
        elif own:
            findings[node] = passed(TRAITS, f"{', '.join(own)} as on most nodes")
        else:
            findings[node] = skipped(TRAITS, "the node shows none of them")
    return findings


def _whole_gib(gpu: Gpu) -> float | None:
    """Its memory: firmware does not reserve the same on all GPUs of a kind."""
    return None if gpu.memory_mib is None else round(gpu.memory_mib / 1024)


def _most(values: Iterable[str]) -> str:
    return Counter(values).most_common(1)[0][0]


def _listed(values: Iterable[float | None]) -> str:
    known = sorted({value for value in values if value is not None})
    return " and ".join(f"{value:g}" for value in known) or "unknown"
