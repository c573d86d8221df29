"""Everything a step needs, built once: groups, model chunks, optimizer, loader.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel

from k25_train.config.schema import Config
from k25_train.data.loader import DataLoader
from k25_train.errors import ConfigError
from k25_train.model.build import (
    build_chunks,
    build_vision_encoder,
    initialize_chunks,
    initialize_vision_encoder,
)
from k25_train.model.megatron_config import BackboneConfig, backbone_config
from k25_train.optim.qk_clip import QkClip
from k25_train.plan.layout import layout_of
from k25_train.training.activations import build_activations
from k25_train.training.assemble import assemble
from k25_train.training.encoder import Vision, build_vision
from parallel.activations.manager import ActivationManager
from parallel.megatron.patches.instrument import set_tracker
from parallel.megatron.platform import has_work_left
from parallel.megatron.skip_non_finite import SkipNonFiniteOptimizer
from parallel.topology import Topology, build_topology, job_store, start_process_group
from parallel.watchdog.phases import PhaseTracker
from parallel.watchdog.rank_states import RankStateStore
from parallel.watchdog.stall_watchdog import StallWatchdog

COLLECTIVE_MARGIN_S = 600.0
"""Communication fails so much later than `train.stall_timeout_s`: the stall guard, which can say where a job
is stuck, speaks first, and only start-up and checkpoints, which it leaves alone, have this longer limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One rank's share of a run."""

    config: Config
    topology: Topology
    backbone: BackboneConfig
    """megatron-core's configuration, which all chunks share and the pipeline schedule reads."""
    chunks: list[DistributedDataParallel]
    """Model chunks of this rank, one per virtual stage."""
    activations: ActivationManager | None
    """What the passes save and how; None if all stays as torch saves it."""
    vision: Vision | None
    """The decoupled encoder; None if the tower is coupled, and part of the first chunk."""
    optimizer: SkipNonFiniteOptimizer
    qk_clip: QkClip | None
    """None where `optim.qk_clip_threshold` is."""
    loader: DataLoader
    tracker: PhaseTracker
    """What this rank is doing, for the report of a stall."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.dir)

    @property
    def modules(self) -> list[DistributedDataParallel]:
        """All that a checkpoint holds weights of."""
        return [*self.chunks, *([] if self.vision is None else [self.vision.encoder])]

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are kept."""
        return self.folder / "checkpoints"

    @property
    def is_main(self) -> bool:
        """Whether this rank writes metrics and prints."""
        return self.topology.rank == 0


def check_world_size(config: Config) -> None:
    """Raise `ConfigError` unless as many processes were started as the configuration counts on."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == config.world_size:
        return
    nodes, per_node = config.cluster.nodes, config.cluster.gpus_per_node
    raise ConfigError(
        f"{started} process(es) started, but cluster.nodes={nodes} x cluster.gpus_per_node={per_node} = "
        f"{config.world_size} ranks are configured: start them with "
        f"`torchrun --nnodes {nodes} --nproc-per-node {per_node} -m k25_train.train …`, or run alone with "
        "`parallelism=serial cluster.nodes=1 cluster.gpus_per_node=1`"
    )


def check_vocabulary(config: Config, loader: DataLoader) -> None:
    """Raise `ConfigError` if the tokenizer has ids that the embedding has no row for."""
    if loader.tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer of {config.data.dir} has {loader.tokenizer.vocab_size} ids, but "
            f"model.vocab_size={config.model.vocab_size}: raise it, or build the shard set with a smaller "
            "--vocab-size"
        )


def build_run(config: Config, device: torch.device, *, trains: bool = True) -> Run:
    """Join the job and build this rank's part of everything. Called by every rank.

    Args:
        trains: whether there are backward passes, for which activations have to be stored.
    """
    check_world_size(config)
    loader = DataLoader(config.data, config.train, config.model.vision)
    check_vocabulary(config, loader)
    timeout_s = config.train.stall_timeout_s + COLLECTIVE_MARGIN_S
    start_process_group(device, timeout_s)
    layout = layout_of(config)
    topology = build_topology(config.parallelism, layout, device, timeout_s)
    backbone = backbone_config(config.model, config.train, config.parallelism, layout)
    models = build_chunks(config, backbone, topology)
    initialize_chunks(models, config, topology)
    encoder = build_vision_encoder(config, backbone, device)
    if encoder is not None:
        initialize_vision_encoder(encoder, config)
    chunks, replica, optimizer = assemble(models, encoder, config, backbone, topology)
    threshold = config.optim.qk_clip_threshold
    tracker = PhaseTracker(topology.rank)
    set_tracker(tracker)
    return Run(
        config=config,
        topology=topology,
        backbone=backbone,
        chunks=chunks,
        activations=build_activations(config, models, topology) if trains else None,
        vision=None if replica is None else build_vision(replica, config, topology, loader, tracker),
        optimizer=optimizer,
        qk_clip=None if threshold is None else QkClip(chunks, optimizer, config.model, threshold, device),
        loader=loader,
        tracker=tracker,
    )


def stall_watchdog(run: Run) -> StallWatchdog:
    """What ends the job if it makes no progress for `train.stall_timeout_s`; use it as a context manager."""
    place = run.topology
    return StallWatchdog(
        run.tracker,
        RankStateStore(job_store(), place.rank, place.world_size),
        timeout_s=run.config.train.stall_timeout_s,
        folder=run.folder / "logs",
        device_is_busy=lambda: has_work_left(place.device),
    )
