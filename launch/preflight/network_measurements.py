"""Verdicts on what was measured of the network itself: transports, and packets over each rail."""

from collections.abc import Mapping

from k25_train.config.cluster import ClusterConfig, Device
from launch.preflight.findings import Finding, skipped
from launch.preflight.path_verdicts import PATH_MTU, judge_path_mtu
from launch.preflight.rank import RankMeasurements
from launch.preflight.raw_verdicts import RAW, judge_raw
from launch.preflight.system import Missing
from launch.preflight.transports import TRANSPORT, judge_transports

Measured = Mapping[int, RankMeasurements]
"""Rank -> measurements, without ranks that reported none."""


def judge_network_measurements(
    measured: Measured, nodes: Mapping[int, str], cluster: ClusterConfig
) -> list[dict[str, Finding]]:
    """For each check: node -> finding. `nodes` maps every rank to its node."""
    everyone = sorted(set(nodes.values()))
    if cluster.fabric is None:
        reason = f"cluster {cluster.name} has no RDMA fabric (cluster.fabric is null)"
        checks = (PATH_MTU, RAW, TRANSPORT)
        return [{node: skipped(check, reason) for node in everyone} for check in checks]
    paths = {nodes[rank]: own.paths for rank, own in measured.items() if own.paths}
    return [
        judge_path_mtu(paths, nodes, everyone, _why_no_paths(measured, len(everyone))),
        _judge_raw(measured, nodes),
        _judge_transports(measured, nodes, cluster),
    ]


def _why_no_paths(measured: Measured, num_nodes: int) -> str:
    if num_nodes == 1:
        return "there is no other node"
    if all(own.paths is None for own in measured.values()):
        return "measuring broke off earlier"
    return "no card has an MTU and a routable address on both nodes, or the other nodes did not answer"


def _judge_raw(measured: Measured, nodes: Mapping[int, str]) -> dict[str, Finding]:
    everyone = sorted(set(nodes.values()))
    by_leader = {rank: own.raw_rates for rank, own in measured.items() if own.raw_rates is not None}
    links = [link for own in by_leader.values() if not isinstance(own, Missing) for link in own]
    absent = {nodes[rank]: own.reason for rank, own in by_leader.items() if isinstance(own, Missing)}
    why = "there is no other node" if len(everyone) == 1 else "measuring broke off earlier"
    if len(everyone) == 1 or not by_leader:
        absent = {node: absent.get(node, why) for node in everyone}
    return judge_raw(links, nodes, everyone, absent)


def _judge_transports(
    measured: Measured, nodes: Mapping[int, str], cluster: ClusterConfig
) -> dict[str, Finding]:
    everyone = sorted(set(nodes.values()))
    if cluster.device is Device.cpu:
        reason = f"cluster {cluster.name} computes on CPUs, whose ranks use gloo"
        return {node: skipped(TRANSPORT, reason) for node in everyone}
    by_rank = {rank: own.transports for rank, own in measured.items() if own.transports is not None}
    absent = "no connection to another node was made" if by_rank else "NCCL was not used"
    ranks = {node: [rank for rank, own in nodes.items() if own == node] for node in everyone}
    return judge_transports(by_rank, ranks, absent)
