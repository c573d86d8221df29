"""Nodes compared with each other: what is right for each of them alone may be wrong among the others."""

from collections.abc import Mapping

from k25_train.config.cluster import ClusterConfig
from launch.preflight.cross_node import judge_versions
from launch.preflight.findings import Finding
from launch.preflight.names import judge_names
from launch.preflight.network import judge_all_rails
from launch.preflight.node import Node
from launch.preflight.traits import judge_traits


def judge_between(nodes: Mapping[str, Node], cluster: ClusterConfig) -> list[dict[str, Finding]]:
    """For each check, node -> finding."""
    return [
        judge_versions({name: node.versions for name, node in nodes.items()}),
        judge_traits({name: node.traits for name, node in nodes.items()}),
        judge_names({name: node.machine.names for name, node in nodes.items()}),
        judge_all_rails({name: node.network for name, node in nodes.items()}, cluster),
    ]
