"""Runs a rank on the CPUs of the NUMA node that its GPU is attached to. Needs no torch.

Page-locked memory then lies there, too: the kernel takes a page from the node of the CPU that first touches
or locks it, unless a site's wrapper (`numactl --interleave`) says otherwise. From the other socket a copy
reaches perhaps half the rate, and half of the ranks would be there.

torchrun's `--numa-binding=node` does the same, but ends the job where `numactl` is not installed or a GPU's
node is unknown, and has torchrun itself open the GPUs to ask them for their addresses (torch 2.13,
`torch/numa/binding.py`). Here each rank asks for its own after it has chosen its GPU, keeps within what the
scheduler and the container allow, and goes on unbound, saying why, where it cannot.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from k25_train.errors import ConfigError

VARIABLE = "K25_NUMA_BINDING"
"""Variable that says to what ranks are bound."""
TO_GPU, OFF = "gpu", "off"
"""Its values."""
UNBOUND = "copies between host and GPU may take twice as long"


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """Where a rank is to run."""

    cpus: frozenset[int] | None
    """CPUs that it may use; None leaves it where it is."""
    text: str
    """What is done, in words; empty if there is nothing to say."""
    is_flawed: bool = False
    """Whether copies will be slow."""


def plan(gpus: Sequence[str], own: int, allowed: Iterable[int], root: Path = Path("/")) -> Binding:
    """Where the rank of a GPU runs.

    Args:
        gpus: PCI addresses of the GPUs of this node's ranks, e.g. 0000:18:00.0.
        own: index of the rank's own.
        allowed: CPUs that it may use now, by the scheduler's or the container's choice.
        root: root of the file tree.
    """
    gpu = gpus[own]
    node = node_of(gpu, root)
    nodes = [name for name in _names(root / "sys/devices/system/node") if re.fullmatch(r"node\d+", name)]
    if len(nodes) < 2:
        return Binding(cpus=None, text="")
    if node is None:
        return _unbound(
            f"the firmware does not say which of {len(nodes)} NUMA nodes GPU {gpu} is attached to"
        )
    # 1. CPUs of the node that this process may use.
    there = f"NUMA node {node} of GPU {gpu}"
    of_node = cpus_in(_read(root / f"sys/devices/system/node/node{node}/cpulist"))
    cpus = of_node & set(allowed)
    if not cpus:
        return _unbound(
            f"no CPU of {there} ({spans(of_node) or 'none'}) is among this job's {spans(allowed)}"
        )
    sharers = sum(node_of(each, root) == node for each in gpus)
    if len(cpus) < sharers:
        return _unbound(f"{sharers} ranks would share {len(cpus)} CPUs of {there} that this job may use")
    # 2. Its memory.
    memory = re.search(r"^Mems_allowed_list:\s*(\S+)", _read(root / "proc/self/status"), re.MULTILINE)
    if memory is not None and node not in cpus_in(memory[1]):
        text = f"memory of {there} is not among this job's ({memory[1]}); {UNBOUND}"
        return Binding(cpus=frozenset(cpus), text=text, is_flawed=True)
    return Binding(cpus=frozenset(cpus), text=f"runs on CPUs {spans(cpus)} of {there}")


def bind(gpus: Sequence[str], own: int, environment: Mapping[str, str], root: Path = Path("/")) -> Binding:
    """Have this process and its threads run where `plan` says; returns what was done.

    Raises `ConfigError` if the environment asks for another binding than there is.
    """
    wanted = environment.get(VARIABLE, TO_GPU)
    if wanted not in (TO_GPU, OFF):
        raise ConfigError(
            f"{VARIABLE}={wanted}: must be {TO_GPU} or {OFF}\n"
            f'  -> correct it in cluster.overrides, as {VARIABLE}: {{value: "{OFF}", reason: …}}'
        )
    if wanted == OFF:
        return Binding(cpus=None, text="")
    planned = plan(gpus, own, os.sched_getaffinity(0), root)
    if planned.cpus is None:
        return planned
    try:
        for thread in os.listdir("/proc/self/task"):
            _move(int(thread), planned.cpus)
    except OSError as error:
        return _unbound(f"not allowed to choose CPUs {spans(planned.cpus)} ({error.strerror})")
    return planned


def _move(thread: int, cpus: Iterable[int]) -> None:
    try:
        os.sched_setaffinity(thread, cpus)
    except ProcessLookupError:
        # It has ended.
        return


def node_of(gpu: str, root: Path = Path("/")) -> int | None:
    """NUMA node of a GPU; None if the firmware does not say."""
    text = _read(root / "sys/bus/pci/devices" / gpu / "numa_node")
    return int(text) if text.isdigit() else None


def cpus_in(text: str) -> set[int]:
    """The numbers of a list as the kernel writes it: `0-2,8`."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def spans(numbers: Iterable[int]) -> str:
    """A list as the kernel writes it."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _unbound(reason: str) -> Binding:
    return Binding(cpus=None, text=f"not bound to a NUMA node: {reason}; {UNBOUND}", is_flawed=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []
