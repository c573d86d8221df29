"""The measurements of ranks, and their verdicts."""

import statistics
from collections.abc import Collection, Mapping

from k25_train.config.cluster import ClusterConfig, Device
from k25_train.config.schema import Config
from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.network_measurements import judge_network_measurements
from launch.preflight.rank import RankMeasurements
from launch.preflight.rates import Link, Scope, Threshold, judge_links, judge_ranks, medians
from launch.preflight.reach import REACH, judge_reach, refusals_of

MEASUREMENT, GEMM, COPY = "measurement", "matrix products", "host to device copy"
CONNECTIONS, ALL_TO_ALL, PLAN = "connections", "expert all-to-all", "rates of the plan"
THRESHOLDS = {
    Device.cuda: Threshold(tolerance=0.1, fails=True),
    Device.cpu: Threshold(tolerance=0.5, fails=False),
}
"""Our choice: GPUs of one kind differ by a few percent, processes on shared cores by much more."""
PRODUCT_SHARE = 0.85
"""Share of what the largest products reach that a measured product should reach. Our choice."""
NETWORK_SHARE = 0.8
"""Share of `cluster.network_gb_per_s` that connections between nodes should reach. Our choice."""


def judge_measurements(
    measured: Mapping[int, RankMeasurements], nodes: Mapping[int, str], config: Config
) -> dict[str, list[Finding]]:
    """Node -> findings on the measurements of its ranks.

    Args:
        measured: rank -> measurements, without ranks that reported none.
        nodes: rank -> node, for every rank that was started.
        config: the job's configuration.
    """
    cluster = config.cluster
    threshold = THRESHOLDS[cluster.device]
    everyone = sorted(set(nodes.values()))
    # 1. Who broke off, and who could not be reached?
    tries = {rank: own.refused for rank, own in measured.items() if own.refused is not None}
    reach = judge_reach(refusals_of(tries, nodes), everyone, {nodes[rank] for rank in tries})
    found: list[dict[str, Finding]] = [_judge_faults(measured, nodes), reach]
    # 2. Devices.
    products = {rank: own.gemm_tflops for rank, own in measured.items() if own.gemm_tflops}
    found.append(judge_ranks(GEMM, "TFLOP/s", products, nodes, threshold))
    if cluster.device is Device.cuda:
        copies = {rank: own.host_copy_gb_per_s for rank, own in measured.items() if own.host_copy_gb_per_s}
        found.append(judge_ranks(COPY, "GB/s", copies, nodes, threshold))
    else:
        found.append(_skipped(COPY, "a CPU has no separate device memory", everyone))
    # 3. Connections and groups.
    links = _both_ends(measured)
    if links:
        found.append(judge_links(CONNECTIONS, links, nodes, threshold))
    else:
        found.append(_skipped(CONNECTIONS, _reason_not_measured(len(nodes), ("ep", "pp"), config), everyone))
    exchanges = {rank: own.all_to_all_gb_per_s for rank, own in measured.items() if own.all_to_all_gb_per_s}
    if exchanges:
        unit = f"GB/s in groups of {config.parallelism.ep}"
        found.append(judge_ranks(ALL_TO_ALL, unit, exchanges, nodes, threshold))
    else:
        found.append(_skipped(ALL_TO_ALL, _reason_not_measured(len(nodes), ("ep",), config), everyone))
    found += judge_network_measurements(measured, nodes, cluster)
    # 4. All of them compared with the plan of a step.
    found.append(_judge_plan(measured, links, nodes, cluster))
    return {node: [by_node[node] for by_node in found] for node in everyone}


def culprits(measured: Mapping[int, RankMeasurements], ranks: Collection[int]) -> set[int]:
    """The ranks that caused measurements to break off: those that reported nothing; otherwise those that
    others waited for first; otherwise all with a fault."""
    silent = set(ranks) - set(measured)
    if silent:
        return silent
    faults = {rank: own.fault for rank, own in measured.items() if own.fault is not None}
    by_exchange = [fault for fault in faults.values() if fault.exchange is not None]
    if not by_exchange:
        return set(faults)
    first = min(fault.exchange for fault in by_exchange if fault.exchange is not None)
    return {fault.peer for fault in by_exchange if fault.exchange == first and fault.peer is not None}


def _judge_faults(measured: Mapping[int, RankMeasurements], nodes: Mapping[int, str]) -> dict[str, Finding]:
    guilty = culprits(measured, nodes)
    texts = {rank: own.fault.text for rank, own in measured.items() if own.fault is not None}
    findings = {}
    for node in set(nodes.values()):
        own_guilty = sorted(rank for rank in guilty if nodes[rank] == node)
        own_texts = [f"rank {rank}: {text}" for rank, text in texts.items() if nodes[rank] == node]
        if own_guilty:
            witnesses = [
                f"rank {rank}: {own.fault.text}"
                for rank, own in measured.items()
                if own.fault is not None and (own.fault.peer in own_guilty or rank in own_guilty)
            ]
            found = f"ranks {own_guilty} did not continue" + "".join(f"; {text}" for text in witnesses[:2])
            rule = "every rank must reach every other of its groups"
            remedy = "see this node's log and its network checks above; drain the node"
            findings[node] = failed(MEASUREMENT, found, rule, remedy)
        elif own_texts:
            findings[node] = skipped(MEASUREMENT, f"broken off by others: {own_texts[0]}")
        elif guilty:
            at_fault = ", ".join(sorted({nodes[rank] for rank in guilty}))
            findings[node] = skipped(MEASUREMENT, f"broken off because of {at_fault}")
        elif any(own.refused for own in measured.values()):
            findings[node] = skipped(MEASUREMENT, f"broken off: not every node is {REACH}")
        else:
            findings[node] = passed(MEASUREMENT, "all ranks completed it")
    return findings


def _judge_plan(
    measured: Mapping[int, RankMeasurements],
    links: Collection[Link],
    nodes: Mapping[int, str],
    cluster: ClusterConfig,
) -> dict[str, Finding]:
    """Node -> finding on the rates that the plan of a step assumes."""
    everyone = sorted(set(nodes.values()))
    if cluster.device is Device.cpu:
        return _skipped(PLAN, "on CPUs, only ratios of the cluster file's rates matter", everyone)
    # Links count for both nodes at their ends.
    findings = {}
    links_by_node: dict[str, list[Link]] = {node: [] for node in everyone}
    for link in links:
        for node in {nodes[rank] for rank in link.pair}:
            links_by_node[node].append(link)
    # Medians per node, compared with the cluster file.
    for node in everyone:
        own = [measured[rank] for rank in measured if nodes[rank] == node]
        reached = medians(links_by_node[node], nodes)
        network = [rate for scope, rate in reached.items() if scope is Scope.between]
        rates = (
            (
                "rates.bf16_tflops x gemm_efficiency",
                [one.gemm_tflops for one in own if one.gemm_tflops],
                PRODUCT_SHARE * cluster.rates.gemm_efficiency * cluster.rates.bf16_tflops,
            ),
            (
                "host_copy_gb_per_s",
                [one.host_copy_gb_per_s for one in own if one.host_copy_gb_per_s],
                cluster.host_copy_gb_per_s,
            ),
            ("network_gb_per_s", network, NETWORK_SHARE * cluster.network_gb_per_s),
        )
        reached_rates = {key: statistics.median(values) for key, values, _ in rates if values}
        short = [
            f"cluster.{key} needs {least:g}, measured {reached_rates[key]:.3g}"
            for key, _, least in rates
            if key in reached_rates and reached_rates[key] < least
        ]
        unmeasured = ", ".join(f"cluster.{key}" for key, values, _ in rates if not values)
        if short:
            rule = "the plan of a step assumes these rates"
            remedy = "correct the cluster file, or find what is slow"
            findings[node] = warned(PLAN, "; ".join(short), rule, remedy)
        elif not reached_rates:
            findings[node] = skipped(PLAN, "none of them was measured")
        else:
            found = ", ".join(f"cluster.{key}: {rate:.3g}" for key, rate in reached_rates.items())
            # The rest is not measured by design: a node alone has no connections to others.
            rest = f"; not measured: {unmeasured}" if unmeasured else ""
            findings[node] = passed(PLAN, f"reached by {found}{rest}")
    return findings


def _both_ends(measured: Mapping[int, RankMeasurements]) -> list[Link]:
    """Each connection once, with the lower of the rates that its two ends measured."""
    slowest: dict[tuple[int, int], Link] = {}
    for own in measured.values():
        for link in own.links:
            if link.pair not in slowest or link.gb_per_s < slowest[link.pair].gb_per_s:
                slowest[link.pair] = link
    return list(slowest.values())


def _reason_not_measured(num_ranks: int, keys: Collection[str], config: Config) -> str:
    """Why nothing was measured in the groups of the parallelism's `keys`."""
    if all(getattr(config.parallelism, key) == 1 for key in keys):
        return f"parallelism.{' and parallelism.'.join(keys)} is 1: nothing is sent"
    if num_ranks == 1:
        nodes, per_node = config.cluster.nodes, config.cluster.gpus_per_node
        start = f"torchrun --nnodes {nodes} --nproc-per-node {per_node} -m launch.preflight"
        return f"a single process has no peer; start all ranks with {start} …"
    return "measuring broke off earlier"


def _skipped(check: str, reason: str, nodes: Collection[str]) -> dict[str, Finding]:
    return {node: skipped(check, reason) for node in nodes}
