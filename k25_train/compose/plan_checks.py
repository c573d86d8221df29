"""Rules that plan a whole step: whether host memory holds what a configuration offloads to it."""

from collections.abc import Sequence

from k25_train.config.cluster import Device
from k25_train.config.optimizer import OptimizerOffload
from k25_train.config.schema import Config
from k25_train.plan.memory.node import fullest_node, node_memories
from k25_train.plan.memory.offload import need_of
from k25_train.plan.memory.stage import stage_memories
from k25_train.plan.memory.stage_memory import StageMemory
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.units import GIB
from parallel.config import Problem


def find_plan_problems(config: Config) -> list[Problem]:
    """Rules that plan a whole step; every other rule must hold."""
    if not _has_plan_rules(config):
        return []
    pipeline = plan_pipeline(config)
    return problems_of_plan(pipeline, stage_memories(pipeline))


def problems_of_plan(pipeline: PipelinePlan, memories: Sequence[StageMemory]) -> list[Problem]:
    """The same for whoever has planned it already, as it is configured, and has the memory of its stages."""
    config = pipeline.config
    if not _has_plan_rules(config):
        return []
    of_activations = host_holds_activations(pipeline) if config.activation.offloads else []
    return [*of_activations, *node_holds_what_is_offloaded(pipeline, memories)]


def _has_plan_rules(config: Config) -> bool:
    return config.activation.offloads or _keeps_state(config)


def _keeps_state(config: Config) -> bool:
    """Whether optimizer state is in host memory."""
    return config.optim.offload is OptimizerOffload.cpu


def host_holds_activations(pipeline: PipelinePlan) -> list[Problem]:
    """A given budget of host memory holds what the schedule offloads if experts share tokens evenly."""
    activation = pipeline.config.activation
    given = activation.host_gib
    if given is None:
        return []
    needs = [need_of(stage, stage.balanced_sizes) for stage in pipeline.stages]
    need = max(needs, key=lambda need: need.host_bytes)
    if given * GIB >= need.host_bytes:
        return []
    stage, least = needs.index(need), need.host_bytes / GIB
    rule = f"must be {least:.4g} or more: stage {stage} has so much in the host at a time, its largest "
    rule += f"micro-batch {need.pass_bytes / GIB:.4g}"
    margin = activation.host_margin
    remedy = f"use {least * margin:.4g} (times host_margin), null to have it counted, or offload less"
    return [Problem("activation.host_gib", given, rule, remedy)]


def node_holds_what_is_offloaded(pipeline: PipelinePlan, memories: Sequence[StageMemory]) -> list[Problem]:
    """A node has the memory for what its ranks keep there, most of which they lock: all that is offloaded of
    activations and optimizer state, and the copy that a checkpoint is written from. Where the device is the
    CPU only that counts: machines for trials are shared with others."""
    config, cluster, offloads = pipeline.config, pipeline.config.cluster, pipeline.config.activation.offloads
    node = fullest_node(node_memories(pipeline, memories))
    is_cpu = cluster.device is Device.cpu
    node_gib = (node.of_ranks.locked if is_cpu else node.total) / GIB
    if node_gib <= cluster.host_memory_gib:
        return []
    rule = f"takes {_whole(node_gib)} GiB on a node of {cluster.gpus_per_node} ranks"
    rule += f" with{' optimizer state and' if _keeps_state(config) else ''} the copy for checkpoints,"
    if not offloads:
        rule = f"takes {_whole(node_gib)} GiB on a node of {cluster.gpus_per_node} ranks with the copy for "
        rule += "checkpoints,"
        rule += f" and cluster.host_memory_gib is {cluster.host_memory_gib:g}"
        remedy = "use more nodes, which share the state, or correct the node's memory"
        return [Problem("optim.offload", config.optim.offload.value, rule, remedy)]
    rule += f" and cluster.host_memory_gib is {cluster.host_memory_gib:g}"
    remedy = "offload fewer activations, or correct the node's memory"
    if config.vision_placement.first_stage_parts and config.activation.host_gib is None:
        remedy += ", or say how many tokens are images' (data.vision_ratio)"
    return [Problem("activation.host_gib", config.activation.host_gib, rule, remedy)]


def _whole(number: float) -> str:
    """Four digits, and no power of ten where there are more."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"
