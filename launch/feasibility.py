"""What is asked of a configuration before it is submitted: what it amounts to, and whether it has a place."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from k25_train.compose.checks import batches_divide, experts_divide, pipeline_divides_ranks
from k25_train.compose.derived import derived_sizes
from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from k25_train.parameters.released import count_parameters
from k25_train.plan.__main__ import shorten
from k25_train.plan.layer_costs import WEIGHT_BYTES
from k25_train.plan.memory.report import verdict
from k25_train.plan.memory.stage import fullest, room_bytes, stage_memories
from k25_train.plan.optimizer import encoder_state_bytes, stage_states


def with_absolute_paths(config: Config) -> Config:
    """The same configuration, with paths that do not depend on the folder in which the job will run."""
    tokenizer, cluster = config.data.tokenizer, config.cluster
    data = replace(
        config.data,
        dir=str(Path(config.data.dir).absolute()),
        tokenizer=None if tokenizer is None else str(Path(tokenizer).absolute()),
    )
    slurm = cluster.slurm
    if slurm is not None and slurm.container_image is not None and slurm.container_image.startswith("."):
        image = os.path.abspath(slurm.container_image)
        cluster = replace(cluster, slurm=replace(slurm, container_image=image))
    run = replace(config.run, dir=str(Path(config.run.dir).absolute()))
    return replace(config, data=data, run=run, cluster=cluster)


def legal_nodes(config: Config) -> list[int]:
    """Numbers of nodes on which the same run can go on, ascending, from `cluster.slurm.min_nodes` to
    `cluster.nodes`: only the number of replicas changes, and the global batch is cut into as many."""
    slurm, most = config.cluster.slurm, config.cluster.nodes
    least = most if slurm is None or slurm.min_nodes is None else slurm.min_nodes
    found = []
    for nodes in range(least, most + 1):
        cluster = replace(config.cluster, nodes=nodes)
        problems = pipeline_divides_ranks(cluster, config.parallelism)
        problems += experts_divide(config.model, cluster, config.parallelism)
        problems += batches_divide(config.train, cluster, config.parallelism)
        if not problems:
            found.append(nodes)
    return found


def memory_verdict(config: Config) -> tuple[bool, list[str]]:
    """Whether the fullest stage fits on its device, and the planner's words; a CPU has none to fill."""
    if config.cluster.gpu_memory_gb is None:
        return True, []
    memories = stage_memories(config)
    return room_bytes(config, fullest(memories)) >= 0, list(verdict(config, memories))


def check_memory(config: Config, nodes: list[int]) -> list[str]:
    """The planner's words on the memory of a run on `cluster.nodes`.

    Raises `ConfigError` if it does not fit there, or on the fewest of `nodes`, on which it may go on: each
    replica less leaves more of the optimizer's state to the others.
    """
    told: list[str] = []
    numbers = {"cluster.nodes": config.cluster.nodes}
    if nodes[0] < config.cluster.nodes:
        numbers = {"cluster.slurm.min_nodes": nodes[0], **numbers}
    for key, number in numbers.items():
        cluster = replace(config.cluster, nodes=number)
        fits, told = memory_verdict(replace(config, cluster=cluster))
        if not fits:
            remedy = "change the configuration, or submit with --force if you know better"
            raise ConfigError("\n  ".join([f"{key}={number}: memory is too small", *told, f"-> {remedy}"]))
    return told


def checkpoint_bytes(config: Config) -> int:
    """What a checkpoint takes: weights, masters and moments."""
    states = sum(state.state_bytes for state in stage_states(config)) + encoder_state_bytes(config)
    return count_parameters(config.model).total * WEIGHT_BYTES[config.train.dtype] + states


def summary(config: Config, nodes: list[int]) -> Iterator[tuple[str, str]]:
    """What the configuration amounts to, as pairs of a name and its value."""
    sizes, parallelism = derived_sizes(config), config.parallelism
    total, active = int(sizes["parameters_total"]), int(sizes["parameters_active"])
    yield "model", f"{config.model.name}, {shorten(total)} parameters, {shorten(active)} active"
    ranks = f"{config.cluster.nodes} nodes x {config.cluster.gpus_per_node} = {config.world_size:,}"
    yield "ranks", f"{ranks} of cluster {config.cluster.name} ({config.cluster.device.value})"
    cuts = f"pp {parallelism.pp} x vpp {parallelism.vpp}, ep {parallelism.ep}, dp {config.dp}"
    yield "layout", f"{cuts}; {sizes['layout']}"
    yield (
        "step",
        (
            f"{config.train.global_batch_size:,} sequences of {config.train.seq_len:,} tokens, "
            f"{config.num_micro_batches:,} micro-batches on each replica"
        ),
    )
    yield "nodes it may have", ", ".join(map(str, nodes))
    yield "checkpoint", f"{checkpoint_bytes(config) / 2**30:,.4g} GiB, {config.checkpoint.keep} are kept"


def check_place(config: Config) -> None:
    """Raise `ConfigError` if the run has no room, the data or the container is not there.

    What a login node cannot see, such as an image in a registry, is left to the nodes.
    """
    folder = Path(config.run.dir)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free_bytes, needed_bytes = shutil.disk_usage(there).free, checkpoint_bytes(config)
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"run.dir={config.run.dir}: {free_bytes / 2**30:,.4g} GiB are free, not even one checkpoint of "
            f"{needed_bytes / 2**30:,.4g} GiB fits: make room or choose another folder"
        )
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(
            f"run.dir={config.run.dir}: {there} is no folder that you can write to: choose another"
        )
    data = Path(config.data.dir) / "dataset.json"
    if not data.is_file():
        raise ConfigError(
            f"data.dir={config.data.dir}: {data} is not there: name the folder of a shard set, or build one "
            "with python -m k25_train.data build"
        )
    image = config.cluster.slurm.container_image if config.cluster.slurm else None
    if image is not None and image.startswith(("/", ".", "~")) and not Path(image).is_file():
        raise ConfigError(
            f"cluster.slurm.container_image={image}: there is no such file: import the image there (enroot "
            "import), or name one in a registry as docker://…"
        )
