"""Checks of a configuration before it is submitted: its sizes, memory, disk, and the files it needs."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from k25_train.compose.checks import batches_divide, experts_divide, pipeline_divides_ranks
from k25_train.compose.derived import derived_sizes
from k25_train.compose.filled import check_filled_in
from k25_train.config.basics import is_url
from k25_train.config.checkpoint import EXTRA_CHECKPOINTS
from k25_train.config.data import DataConfig
from k25_train.config.schema import Config
from k25_train.config.sources import SourceFormat, folder_of
from k25_train.errors import ConfigError
from k25_train.plan.memory.checkpoint import checkpoint_bytes
from k25_train.plan.memory.verdict import judge_memory
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.report.memory_lines import memory_lines
from k25_train.plan.report.planned import gpu_s_of_step
from k25_train.units import GIB, format_count


def with_absolute_paths(config: Config) -> Config:
    """The same configuration with paths that do not depend on the job's working directory."""
    tokenizer, cluster = config.data.tokenizer, config.cluster
    data = replace(
        config.data,
        dir=absolute(config.data.dir),
        tokenizer=None if tokenizer is None else absolute(tokenizer),
    )
    cluster = replace(cluster, secrets={name: home(path) for name, path in cluster.secrets.items()})
    slurm = cluster.slurm
    if slurm is not None:
        image, credentials = slurm.container_image, slurm.container_credentials
        if image is not None and image.startswith("."):
            image = os.path.abspath(image)
        credentials = None if credentials is None else home(credentials)
        slurm = replace(slurm, container_image=image, container_credentials=credentials)
        cluster = replace(cluster, slurm=slurm)
    run = replace(config.run, dir=absolute(config.run.dir))
    saved = config.checkpoint
    checkpoint = replace(
        saved,
        dir=absolute(saved.dir) if saved.dir else None,
        local_dir=absolute(saved.local_dir) if saved.local_dir else None,
        init_from=absolute(saved.init_from) if saved.init_from else None,
        init_parts={part: absolute(path) for part, path in saved.init_parts.items()},
    )
    return replace(config, data=data, run=run, cluster=cluster, checkpoint=checkpoint)


def home(path: str) -> str:
    """The path with `~` replaced: quoted, as in the batch script, no shell does so."""
    return os.path.expanduser(path)


def absolute(path: str) -> str:
    """The path from the root; a URL as it is."""
    return path if is_url(path) else str(Path(path).absolute())


def legal_nodes(config: Config) -> list[int]:
    """Node counts on which the same run can go on, ascending, from `cluster.slurm.min_nodes` to
    `cluster.nodes`: only the number of replicas changes, and with it the split of the global batch."""
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
    """Whether devices and nodes have room, and the planner's report; empty on a CPU."""
    if config.cluster.gpu_memory_gb is None:
        return True, []
    pipeline = plan_pipeline(config)
    verdict = judge_memory(pipeline, cost=gpu_s_of_step)
    return verdict.fit.is_possible, list(memory_lines(pipeline, verdict))


def check_memory(config: Config, nodes: list[int]) -> list[str]:
    """The planner's report on the memory of a run on `cluster.nodes`.

    Raises `ConfigError` if the run does not fit there, or on the smallest of `nodes`, the counts on which it
    can go on: the fewer replicas, the larger each one's share of the optimizer's state.
    """
    report: list[str] = []
    counts = {"cluster.nodes": config.cluster.nodes}
    if nodes[0] < config.cluster.nodes:
        counts = {"cluster.slurm.min_nodes": nodes[0], **counts}
    for key, count in counts.items():
        cluster = replace(config.cluster, nodes=count)
        fits, report = memory_verdict(replace(config, cluster=cluster))
        if not fits:
            remedy = "change the configuration, or submit with --force if you know better"
            raise ConfigError("\n  ".join([f"{key}={count}: memory is too small", *report, f"-> {remedy}"]))
    return report


def summary(config: Config, nodes: list[int]) -> Iterator[tuple[str, str]]:
    """The configuration's main figures, as pairs of name and value."""
    sizes, parallelism = derived_sizes(config), config.parallelism
    total, active = int(sizes["parameters_total"]), int(sizes["parameters_active"])
    yield "model", f"{config.model.name}, {format_count(total)} parameters, {format_count(active)} active"
    ranks = f"{config.cluster.nodes} nodes x {config.cluster.gpus_per_node} = {config.world_size:,}"
    yield "ranks", f"{ranks} of cluster {config.cluster.name} ({config.cluster.device.value})"
    shared = f", cp {parallelism.cp}" if parallelism.cp > 1 else ""
    cuts = f"pp {parallelism.pp} x vpp {parallelism.vpp}, ep {parallelism.ep}{shared}, dp {config.dp}"
    yield "layout", f"{cuts}; {sizes['layout']}"
    yield (
        "step",
        (
            f"{config.train.global_batch_size:,} sequences of {config.train.seq_len:,} tokens, "
            f"{config.num_micro_batches:,} micro-batches on each replica"
        ),
    )
    yield "legal node counts", ", ".join(map(str, nodes))
    size, keep = f"{checkpoint_bytes(config) / GIB:,.4g} GiB", config.checkpoint.keep
    yield "checkpoint", f"{size}, {keep} are kept, at most {keep + EXTRA_CHECKPOINTS} are on disk"


def check_paths(config: Config) -> None:
    """Raise `ConfigError` if the disk is too small, or the data or container image is missing.

    What a login node cannot see, such as an image in a registry, is left for the nodes to check.
    """
    # Disk space and write access of the run folder and the checkpoints'.
    needed_bytes, place = checkpoint_bytes(config), config.checkpoint.dir
    if place is None:
        check_folder("run.dir", config.run.dir, needed_bytes)
    else:
        check_folder("run.dir", config.run.dir, 0)
    if place is not None and not is_url(place):
        check_folder("checkpoint.dir", place, needed_bytes)
    # Data and container image.
    check_data(config.data)
    check_private_files(config)
    image = config.cluster.slurm.container_image if config.cluster.slurm else None
    if image is not None and image.startswith(("/", ".", "~")) and not Path(image).is_file():
        raise ConfigError(
            f"cluster.slurm.container_image={image}: no such file: import the image there (enroot "
            "import), or name one in a registry as docker://…"
        )


def check_folder(key: str, folder: str, needed_bytes: int) -> None:
    """Raise `ConfigError` if a folder, or where it would be made, cannot be written or has not the room for a
    checkpoint of `needed_bytes`."""
    existing = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"{key}={folder}: {free_bytes / GIB:,.4g} GiB are free, not enough for "
            f"one checkpoint of {needed_bytes / GIB:,.4g} GiB: make room or choose another folder"
        )
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"{key}={folder}: {existing} is not a writable folder: choose another")


def check_data(data: DataConfig) -> None:
    """Raise `ConfigError` if a path is still to be filled in, or a local one leads nowhere.

    Globs and prefixes are held against the folder that they are in; the rest is for the nodes to check.
    """
    check_filled_in(data)
    for name, source in data.sources.items():
        path = data.path_of(source)
        is_shards = source.format is SourceFormat.shards
        folder = path if source.is_folder else folder_of(path)
        wanted = Path(folder) / "dataset.json" if is_shards else Path(folder)
        if not is_url(path) and not wanted.exists():
            raise ConfigError(
                f"data.sources.{name}.path={path}: {wanted} does not exist: name where the data are "
                "(data.dir, data.sources), or make the smoke set with python -m k25_train.data build"
            )


def check_private_files(config: Config) -> None:
    """Raise `ConfigError` if a file with secrets is missing, empty, or readable by others than its owner."""
    slurm = config.cluster.slurm
    files = {f"cluster.secrets.{name}": path for name, path in config.cluster.secrets.items()}
    if slurm is not None and slurm.container_credentials is not None:
        files["cluster.slurm.container_credentials"] = slurm.container_credentials
    for key, path in files.items():
        file = Path(path).expanduser()
        if not file.is_file() or not os.access(file, os.R_OK):
            raise ConfigError(f"{key}={path}: is not a file that you can read: write the secret into it")
        if file.stat().st_mode & 0o077:
            mode = f"{file.stat().st_mode & 0o777:o}"
            raise ConfigError(f"{key}={path}: others may use it (mode {mode}): chmod 600 {path}")
        if not file.stat().st_size:
            raise ConfigError(f"{key}={path}: is empty: write the secret into it")
