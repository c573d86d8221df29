"""A preflight from start to end on every rank: read the nodes, measure, judge on rank 0."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from k25_train.config.cluster import Device
from k25_train.config.schema import Config
from k25_train.plan.memory.checkpoint import checkpoint_bytes
from launch.preflight import measure
from launch.preflight.between import judge_between
from launch.preflight.coordination import Coordinator
from launch.preflight.cross_node import Offset, judge_clocks
from launch.preflight.findings import Finding, Verdict, failed, worst
from launch.preflight.groups import expert_groups, plan_rounds
from launch.preflight.measurements import judge_measurements
from launch.preflight.node import Node, judge_node, read_after_load, read_node, read_under_load
from launch.preflight.path_mtu import answering, rails_of, try_paths
from launch.preflight.rank import Fault, RankMeasurements
from launch.preflight.raw_rates import measure_raw_rates
from launch.preflight.reach import listening
from launch.preflight.report import plain, print_report, summary, write_report
from launch.preflight.same_job import compare_job
from launch.preflight.shared_folder import try_shared_folder
from launch.preflight.system import System
from launch.preflight.transports import recorded_log

NODE_TIMEOUT_S = 300.0
"""Time within which every node must be read, and every device must have computed: commands of a faulty node
time out first, and imports from a cold shared file system take a minute."""
MEASURE_TIMEOUT_S = 3 * measure.ANSWER_TIMEOUT_S
"""Time for the last rank to finish after rank 0: it may give up on a peer that gave up on another."""
ANSWER = "answer"
"""Name of the check that a node answers."""


def run_preflight(
    config: Config, coordinator: Coordinator, system: System, host: str, console: Console, folder: Path
) -> bool:
    """Run the preflight on this rank. False if this is rank 0 and a check failed, otherwise True.

    Args:
        config: the job's configuration.
        coordinator: connects the ranks.
        system: reads this node.
        host: name of this node.
        console: shows rank 0's report.
        folder: where preflight.json is written.
    """
    # 1. Read every node at rest; go on only if all answer.
    node = read_node(system, host, config) if coordinator.is_node_leader else None
    if node is not None:
        coordinator.publish("node", node)
    nodes, goes_on = coordinator.collect_and_vote(
        "node", coordinator.node_leaders, Node, lambda _: True, NODE_TIMEOUT_S
    )
    # 2. Compare clocks, measure devices and connections, and read the nodes' counters again.
    offsets: dict[int, Offset | None] = {}
    measured: dict[int, RankMeasurements] = {}
    together: dict[int, list[Finding]] = {}
    if goes_on:
        together = compare_job(config, coordinator, host)
        if coordinator.is_node_leader:
            for leader, own in try_shared_folder(config, coordinator).items():
                together[leader] += own
        if coordinator.is_first:
            offsets = coordinator.measure_clocks(measure.ANSWER_TIMEOUT_S)
        elif coordinator.is_node_leader:
            coordinator.answer_clock(NODE_TIMEOUT_S)
        # All devices compute at the same time: a node's GPUs are read under load by its first rank.
        coordinator.share_decision("measuring", True if coordinator.is_first else None, 2 * NODE_TIMEOUT_S)
        measured = measure_ranks(config, coordinator, system, node)
        if node is not None:
            read_after_load(system, node, config)
            coordinator.publish("node after", node)
    # 3. Rank 0 judges and reports; the others are done.
    if not coordinator.is_first:
        coordinator.leave(2 * MEASURE_TIMEOUT_S)
        return True
    if goes_on:
        nodes |= coordinator.collect("node after", coordinator.node_leaders, Node, NODE_TIMEOUT_S)
    findings = judge(config, coordinator, nodes, measured if goes_on else None, offsets, together)
    # Written before it is printed: a supervisor reads the file, whatever becomes of the terminal. And printed
    # where it cannot be written.
    try:
        path = write_report(folder, findings, _facts(coordinator, nodes, measured))
    finally:
        print_report(console, findings)
    console.print(f"\n{summary(findings)}\nreport: {path}", highlight=False, soft_wrap=True)
    coordinator.leave(0)
    return worst(finding for own in findings.values() for finding in own) is not Verdict.failed


def measure_ranks(
    config: Config, coordinator: Coordinator, system: System, node: Node | None
) -> dict[int, RankMeasurements]:
    """Measure this rank; on rank 0, returns rank -> measurements, without ranks that reported none.

    Ranks connect only if every device computes and every node can be reached: otherwise those waiting for a
    broken one would look broken, too.
    """
    # 1. Does every device compute?
    own = RankMeasurements()
    device = measure_device(config, coordinator, system, node, own)
    everyone = range(coordinator.world_size)
    coordinator.publish("computed", own)
    computed, goes_on = coordinator.collect_and_vote(
        "computed", everyone, RankMeasurements, lambda one: one.fault is None, NODE_TIMEOUT_S
    )
    if device is None or not goes_on or coordinator.world_size == 1:
        return computed
    # 2. Can every node be reached?
    fabric = config.cluster.fabric
    where = (None,) if fabric is None else (fabric.interfaces[0], fabric.address_family.value)
    rails = [] if node is None else rails_of(node.network.in_use(fabric), fabric)
    with listening(*where) as endpoint, answering(rails) as open_rails:
        if coordinator.is_node_leader:
            own.refused = coordinator.try_neighbours(endpoint, NODE_TIMEOUT_S)
            own.paths = try_paths(rails, coordinator.exchange_rails(open_rails, measure.ANSWER_TIMEOUT_S))
        if node is not None and not own.refused:
            used = node.network.in_use(fabric)
            own.raw_rates = measure_raw_rates(coordinator, system, used, fabric, measure.ANSWER_TIMEOUT_S)
        coordinator.publish("reached", own)
        reached, goes_on = coordinator.collect_and_vote(
            "reached", everyone, RankMeasurements, lambda one: not one.refused, NODE_TIMEOUT_S
        )
    if not goes_on:
        return reached
    # 3. Connect all ranks and measure.
    with recorded_log() as log:
        try:
            measure_connections(config, coordinator, device, own)
        except measure.StuckError as error:
            own.fault = error.fault
        own.transports = log.transports() if device.type == "cuda" else None
    coordinator.publish("measured", own)
    if not coordinator.is_first:
        return {}
    return coordinator.collect("measured", everyone, RankMeasurements, MEASURE_TIMEOUT_S)


def measure_device(
    config: Config, coordinator: Coordinator, system: System, node: Node | None, measured: RankMeasurements
) -> torch.device | None:
    """Add the rates of this rank's device to `measured`, or its fault; returns None if it is faulty."""
    try:
        device = measure.prepare_device(config.cluster.device.value, coordinator.local_rank)
        measured.gemm_tflops = measure.measure_gemm(
            device, lambda: read_under_load(system, node) if node is not None else None
        )
        if config.cluster.device is Device.cuda:
            measured.host_copy_gb_per_s = measure.measure_host_copy(device)
    except RuntimeError as error:
        # Raised by CUDA and its libraries; reported like any other fault.
        measured.fault = Fault(text="computing").ended_by(error)
        return None
    return device


def measure_connections(
    config: Config, coordinator: Coordinator, device: torch.device, measured: RankMeasurements
) -> None:
    """Add the rates of this rank's connections to `measured`. Raises `StuckError` if one does not answer."""
    sizes = config.parallelism
    measure.open_group(coordinator.store, coordinator.rank, coordinator.world_size, device)
    rounds = plan_rounds(coordinator.world_size, pp=sizes.pp, ep=sizes.ep, cp=sizes.cp)
    for link in measure.measure_pairs(rounds, device):
        # One by one, so that those before a fault are reported, too.
        measured.links.append(link)
    if sizes.ep > 1:
        groups = expert_groups(coordinator.world_size, sizes.ep)
        measured.all_to_all_gb_per_s = measure.measure_all_to_all(groups, device)


def judge(
    config: Config,
    coordinator: Coordinator,
    nodes: Mapping[int, Node],
    measured: Mapping[int, RankMeasurements] | None,
    offsets: Mapping[int, Offset | None],
    together: Mapping[int, Sequence[Finding]],
) -> dict[str, list[Finding]]:
    """Node -> all its findings.

    Args:
        config: the job's configuration.
        coordinator: rank 0's.
        nodes: node leader -> what it read; without silent nodes.
        measured: rank -> measurements; None if nothing was measured because nodes are silent.
        offsets: node leader -> clock offset.
        together: node leader -> what nodes found out with each other; empty if nodes are silent.
    """
    # 1. Each node on its own.
    names = node_names(nodes, coordinator)
    present = {rank: names[rank] for rank in nodes}
    one_bytes = checkpoint_bytes(config)
    findings = {names[rank]: judge_node(node, config, one_bytes) for rank, node in nodes.items()}
    # 2. Nodes compared with each other.
    clocks = judge_clocks({names[rank]: offset for rank, offset in offsets.items()}, names[0])
    between = judge_between({present[rank]: node for rank, node in nodes.items()}, config.cluster)
    for name, own in findings.items():
        own += [by_node[name] for by_node in (*between, clocks) if name in by_node]
    for rank, own_findings in together.items():
        findings[names[rank]] += own_findings
    # 3. Silent nodes, and measurements.
    for rank, name in names.items():
        if rank not in nodes:
            found = f"the node with ranks {rank} to {rank + coordinator.ranks_per_node - 1} reported nothing"
            rule = f"every node must answer within {NODE_TIMEOUT_S:g} s"
            findings[name] = [failed(ANSWER, found, rule, "see its log and drain it; nothing was measured")]
    if measured is not None:
        node_of_rank = {rank: names[coordinator.leader_of(rank)] for rank in range(coordinator.world_size)}
        for name, own in judge_measurements(measured, node_of_rank, config).items():
            findings[name] += own
    return findings


def node_names(nodes: Mapping[int, Node], coordinator: Coordinator) -> dict[int, str]:
    """Node leader -> name of the node; nodes of the same name are distinguished by their number."""
    if coordinator.node_names is not None:
        return dict(zip(coordinator.node_leaders, coordinator.node_names, strict=True))
    hosts = {
        rank: nodes[rank].name if rank in nodes else f"node {number}"
        for number, rank in enumerate(coordinator.node_leaders)
    }
    all_hosts = list(hosts.values())
    return {
        rank: host if all_hosts.count(host) == 1 else f"{host} (node {number})"
        for number, (rank, host) in enumerate(hosts.items())
    }


def _facts(
    coordinator: Coordinator, nodes: Mapping[int, Node], measured: Mapping[int, RankMeasurements]
) -> dict[str, dict[str, Any]]:
    """Node -> what was read and measured, for the JSON report."""
    names = node_names(nodes, coordinator)
    return {
        names[rank]: {
            "read": plain(asdict(node)),
            "measured": {
                str(other): plain(asdict(own))
                for other, own in measured.items()
                if coordinator.leader_of(other) == rank
            },
        }
        for rank, node in nodes.items()
    }
