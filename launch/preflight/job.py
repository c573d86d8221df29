"""The course of a preflight on every rank: read the nodes, meet, measure, judge on rank 0."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from k25_train.config.cluster import Device
from k25_train.config.schema import Config
from launch.feasibility import checkpoint_bytes
from launch.preflight import measure
from launch.preflight.coordination import Meeting
from launch.preflight.cross_node import Offset, judge_clocks, judge_versions
from launch.preflight.findings import Finding, Verdict, failed, worst
from launch.preflight.groups import expert_groups, plan_rounds
from launch.preflight.machine import Machine
from launch.preflight.measurements import Fault, Measured, judge_measured
from launch.preflight.node import Node, judge_node, read_after_load, read_node, read_under_load
from launch.preflight.reach import listening
from launch.preflight.report import print_report, summary, write_report

NODE_TIMEOUT_S = 300.0
"""In which every node has been read, and every device has computed: commands of a sick node run into their
own limit first, and imports take a minute from a cold shared file system."""
MEASURE_TIMEOUT_S = 3 * measure.ANSWER_TIMEOUT_S
"""In which the last rank is done after rank 0 is: a rank gives up on a peer that gave up on another."""
SILENCE = "answer"


def run_preflight(
    config: Config, meeting: Meeting, machine: Machine, host: str, console: Console, folder: Path
) -> bool:
    """Carry it out on this rank. True unless this is rank 0 and a check failed.

    `host` is the name of this machine, `meeting` connects the ranks, `console` shows rank 0's report, which
    `folder` keeps.
    """
    node = read_node(machine, host, config) if meeting.speaks_for_node else None
    if node is not None:
        meeting.tell("node", node)
    nodes, goes_on = meeting.agree("node", meeting.node_ranks, lambda _: True, NODE_TIMEOUT_S)
    offsets: dict[int, Offset | None] = {}
    measured: dict[int, Measured] = {}
    if goes_on:
        if meeting.is_first:
            offsets = meeting.measure_clocks(measure.ANSWER_TIMEOUT_S)
        elif meeting.speaks_for_node:
            meeting.answer_clock(NODE_TIMEOUT_S)
        measured = measure_ranks(config, meeting, machine, node)
        if node is not None:
            read_after_load(machine, node, config)
            meeting.tell("node after", node)
    if not meeting.is_first:
        meeting.part(2 * MEASURE_TIMEOUT_S)
        return True
    if goes_on:
        nodes |= meeting.collect("node after", meeting.node_ranks, NODE_TIMEOUT_S)
    findings = judge(config, meeting, nodes, measured if goes_on else None, offsets)
    print_report(console, findings)
    path = write_report(folder, findings, _facts(meeting, nodes, measured))
    console.print(f"\n{summary(findings)}\nreport: {path}", highlight=False, soft_wrap=True)
    meeting.part(0)
    return worst(finding for own in findings.values() for finding in own) is not Verdict.failed


def measure_ranks(
    config: Config, meeting: Meeting, machine: Machine, node: Node | None
) -> dict[int, Measured]:
    """Measure this rank. On rank 0: rank -> what it measured, without those that told nothing.

    Nobody connects unless every device computes and every node can be reached: whoever waited for a broken
    one would look broken as well.
    """
    own = Measured()
    device = measure_device(config, meeting, machine, node, own)
    everyone = range(meeting.world_size)
    meeting.tell("computed", own)
    computed, goes_on = meeting.agree("computed", everyone, lambda one: one.fault is None, NODE_TIMEOUT_S)
    if device is None or not goes_on or meeting.world_size == 1:
        return computed
    fabric = config.cluster.fabric
    with listening(None if fabric is None else fabric.interface) as place:
        if meeting.speaks_for_node:
            own.refused = meeting.try_neighbours(place, NODE_TIMEOUT_S)
        meeting.tell("reached", own)
        reached, goes_on = meeting.agree("reached", everyone, lambda one: not one.refused, NODE_TIMEOUT_S)
    if not goes_on:
        return reached
    try:
        measure_connections(config, meeting, device, own)
    except measure.StuckError as error:
        own.fault = error.fault
    meeting.tell("measured", own)
    return meeting.collect("measured", everyone, MEASURE_TIMEOUT_S) if meeting.is_first else {}


def measure_device(
    config: Config, meeting: Meeting, machine: Machine, node: Node | None, measured: Measured
) -> torch.device | None:
    """Add the rates of this rank's device, or the fault in whose case it has none."""
    try:
        device = measure.prepare_device(config.cluster.device.value, meeting.local_rank)
        measured.gemm_tflops = measure.measure_gemm(
            device, lambda: read_under_load(machine, node) if node is not None else None
        )
        if config.cluster.device is Device.cuda:
            measured.host_copy_gb_per_s = measure.measure_host_copy(device)
    except RuntimeError as error:
        # What CUDA and its libraries raise; the rank has to tell it like any other fault.
        measured.fault = Fault(text="computing").ended_by(error)
        return None
    return device


def measure_connections(config: Config, meeting: Meeting, device: torch.device, measured: Measured) -> None:
    """Add the rates of this rank's connections. Raises `StuckError` if one does not answer."""
    sizes = config.parallelism
    measure.open_group(meeting.store, meeting.rank, meeting.world_size, device)
    rounds = plan_rounds(meeting.world_size, pp=sizes.pp, ep=sizes.ep)
    for link in measure.measure_pairs(rounds, device):
        # One by one, so that those before a fault are told as well.
        measured.links.append(link)
    if sizes.ep > 1:
        groups = expert_groups(meeting.world_size, sizes.ep)
        measured.all_to_all_gb_per_s = measure.measure_all_to_all(groups, device)


def judge(
    config: Config,
    meeting: Meeting,
    nodes: Mapping[int, Node],
    measured: Mapping[int, Measured] | None,
    offsets: Mapping[int, Offset | None],
) -> dict[str, list[Finding]]:
    """Node -> all its findings. `nodes` and `offsets` are by the rank that reads a node, `measured` by
    rank; it is None where nodes are missing."""
    names = node_names(nodes, meeting)
    present = {rank: names[rank] for rank in nodes}
    needed = run_bytes(config)
    findings = {names[rank]: judge_node(node, config, needed) for rank, node in nodes.items()}
    versions = judge_versions({present[rank]: node.versions for rank, node in nodes.items()})
    clocks = judge_clocks({names[rank]: offset for rank, offset in offsets.items()}, names[0])
    for name, own in findings.items():
        own += [by_node[name] for by_node in (versions, clocks) if name in by_node]
    for rank, name in names.items():
        if rank not in nodes:
            found = f"the node with ranks {rank} to {rank + meeting.ranks_per_node - 1} told nothing"
            rule = f"every node must answer within {NODE_TIMEOUT_S:g} s"
            findings[name] = [failed(SILENCE, found, rule, "see its log; drain it; nothing was measured")]
    if measured is not None:
        of_ranks = {rank: names[meeting.node_rank(rank)] for rank in range(meeting.world_size)}
        for name, own in judge_measured(measured, of_ranks, config).items():
            findings[name] += own
    return findings


def node_names(nodes: Mapping[int, Node], meeting: Meeting) -> dict[int, str]:
    """Rank that reads a node -> its name; machines of one name are told apart by their number."""
    if meeting.hosts is not None:
        return dict(zip(meeting.node_ranks, meeting.hosts, strict=True))
    hosts = {
        rank: nodes[rank].name if rank in nodes else f"node {number}"
        for number, rank in enumerate(meeting.node_ranks)
    }
    all_hosts = list(hosts.values())
    return {
        rank: host if all_hosts.count(host) == 1 else f"{host} (node {number})"
        for number, (rank, host) in enumerate(hosts.items())
    }


def run_bytes(config: Config) -> int:
    """Disk that a run takes: the checkpoints that are kept and the one being written."""
    return (config.checkpoint.keep + 1) * checkpoint_bytes(config)


def _facts(
    meeting: Meeting, nodes: Mapping[int, Node], measured: Mapping[int, Measured]
) -> dict[str, dict[str, Any]]:
    """Node -> what was read and measured, for the JSON report."""
    names = node_names(nodes, meeting)
    return {
        names[rank]: {
            "read": _plain(asdict(node)),
            "measured": {
                str(other): _plain(asdict(own))
                for other, own in measured.items()
                if meeting.node_rank(other) == rank
            },
        }
        for rank, node in nodes.items()
    }


def _plain(value: Any) -> Any:
    """The same in what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
