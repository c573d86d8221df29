"""Everything a step needs, built once: groups, model chunks, optimizer, loader.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel

from k25_train.checkpoint.agreement import on_first_rank
from k25_train.checkpoint.owner import own_checkpoints
from k25_train.checkpoint.storage.kinds import Place
from k25_train.checkpoint.storage.places import checkpoints_of
from k25_train.config.algorithm import AlgorithmConfig, PolicyForm
from k25_train.config.schema import Config
from k25_train.data.batch import Reads
from k25_train.data.regions import leave_pageable
from k25_train.data.served import SourceSummary, with_media
from k25_train.data.share_reader import Share
from k25_train.data.source import DataSource, Opened
from k25_train.errors import ConfigError
from k25_train.joining.claim import NoClaim, claim_folder
from k25_train.joining.join import join
from k25_train.joining.network import say
from k25_train.joining.place import place_in
from k25_train.joining.same_job import SameJob
from k25_train.model.build import build_model
from k25_train.model.megatron_config import backbone_config
from k25_train.objectives.base import Objective
from k25_train.objectives.next_token import NextToken
from k25_train.objectives.policy_gradient import PolicyGradient
from k25_train.optim.qk_clip import NoClip, QkClip, build_qk_clip
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.training.activations import Activations, KeepEverything, build_activations
from k25_train.training.assemble import assemble
from k25_train.training.decoupled_tower import build_decoupled_tower
from k25_train.training.device_memory import DeviceMemory, NoDeviceMemory, build_device_memory
from k25_train.training.expert_load import ExpertLoad
from k25_train.training.inputs import InputReader
from k25_train.training.staging import build_staging, page_lock
from k25_train.training.tower import CoupledTower, Tower
from k25_train.training.weight_norms import WeightNorms, build_weight_norms
from parallel.communicators import communicators_of
from parallel.config import DepMode
from parallel.megatron.patches.instrument import set_tracker
from parallel.megatron.platform import has_work_left
from parallel.megatron.replicas import EncoderReplica
from parallel.megatron.skip_non_finite import SkipNonFiniteOptimizer
from parallel.topology import Topology, build_topology, job_store, start_process_group
from parallel.warm_up import set_up
from parallel.watchdog.phases import PhaseTracker
from parallel.watchdog.rank_states import RankStateStore
from parallel.watchdog.stall_watchdog import StallWatchdog

SET_UP_S = 300.0
"""Longest time without progress while communicators are set up: thousands of ranks take a minute for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One rank's share of a run. Options that are off have parts that do nothing."""

    config: Config
    """The configuration of the run."""
    topology: Topology
    """This rank's place, and the groups it communicates in."""
    chunks: list[DistributedDataParallel]
    """Model chunks of this rank, one per virtual stage."""
    activations: Activations
    """How passes save what their backward passes need."""
    memory: DeviceMemory | NoDeviceMemory
    """Counts the device memory of steps."""
    tower: Tower
    """The vision tower: decoupled, or coupled and so part of the first chunk."""
    objective: Objective
    """What scores tokens, and names what is reported of them."""
    optimizer: SkipNonFiniteOptimizer
    """The optimizer of all parameters, sharded."""
    qk_clip: QkClip | NoClip
    """Keeps attention logits from growing."""
    expert_load: ExpertLoad
    """Counts what the experts get."""
    weight_norms: WeightNorms
    """Sums up weights every so many steps."""
    data: DataSource
    """Training and held-out data, planned and read for this rank."""
    sources: tuple[SourceSummary, ...]
    """What they are made of."""
    reader: InputReader
    """Agrees on them with other ranks, and brings them to the device."""
    tracker: PhaseTracker
    """What this rank is doing, for the report of a stall."""
    claim: NoClaim
    """Keeps other runs out of the run folder."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.dir)

    @property
    def checkpoints(self) -> Place:
        """Where checkpoints are kept."""
        return checkpoints_of(self.config.run.dir, self.config.checkpoint.dir)

    @property
    def modules(self) -> list[DistributedDataParallel]:
        """Everything that a checkpoint holds weights of."""
        return [*self.chunks, *self.tower.replicas]

    @property
    def tokens_per_micro_batch(self) -> int:
        """Tokens of a micro-batch, padding included."""
        return self.config.train.micro_batch_size * self.config.train.seq_len

    def zero_gradients(self) -> None:
        """Clear the gradients of the previous step."""
        for module in self.modules:
            module.zero_grad_buffer()
        self.optimizer.zero_grad()

    def move_expert_bias(self, moves: bool) -> None:
        """Let the routers' expert biases follow the load of the next step, or stay as they are."""
        for chunk in self.chunks:
            # With rate 0 megatron-core adds exactly nothing.
            chunk.config.moe_router_bias_update_rate = self.config.model.expert_bias_update_rate * moves

    @property
    def is_main(self) -> bool:
        """Whether this rank writes metrics and prints."""
        return self.topology.rank == 0


def open_data(config: Config, data: DataSource) -> Opened:
    """Open the data of this rank. Raises `ConfigError` if the tokenizer has ids that the embedding has no row
    for."""
    opened = data.open()
    if opened.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer of the data has {opened.vocab_size} ids, but "
            f"model.vocab_size={config.model.vocab_size}: raise it, or tokenize the data with "
            "a smaller vocabulary"
        )
    return opened


def build_run(config: Config, device: torch.device, data: DataSource, *, trains: bool = True) -> Run:
    """Join the job and build this rank's part of everything. Called by every rank.

    Args:
        data: not opened yet (`start_source`).
        trains: whether there are backward passes, for which activations have to be stored, and the run folder
            is written to, which this job then holds.
    """
    # 1. All ranks are of one job, with the same data: groups and collectives would fail without a word of it.
    where = place_in(config)
    timeout_s = config.train.collective_timeout_s
    store = join(where, timeout_s)
    job = SameJob(store, where)
    job.check_start(config)
    sources = job.load_data(lambda: open_data(config, data), lambda _: data.facts()).sources

    # 2. Process groups, and one run folder for all.
    start_process_group(device, timeout_s, store, where.rank, where.world_size)
    claim = claim_folder(config, where, store) if trains else NoClaim()
    pipeline = plan_pipeline(config)
    layout = pipeline.layout
    topology = build_topology(
        config.parallelism,
        layout,
        device,
        timeout_s,
        separates_gradients=config.dep.separates_gradients,
    )
    tracker = PhaseTracker(topology.rank)
    connect(config, topology, tracker)
    if trains:
        on_first_rank(lambda: own_checkpoints(config.run.dir, config.checkpoint.dir))

    # 3. The model, then what trains it.
    backbone = backbone_config(config.model, config.train, config.parallelism, layout)
    model = build_model(config, backbone, topology)
    model.initialize(config.train.seed, config.model.init_std)
    chunks, encoders, optimizer = assemble(model, config, backbone, topology)
    set_tracker(tracker)
    stage = pipeline.stages[topology.pp_rank]
    tower = build_tower(encoders, pipeline, topology, tracker)
    data.take(share_of(config, topology), page_lock if device.type == "cuda" else leave_pageable)
    return Run(
        config=config,
        topology=topology,
        chunks=chunks,
        activations=build_activations(stage, model.chunks, topology) if trains else KeepEverything(),
        memory=build_device_memory(pipeline, topology) if trains else NoDeviceMemory(),
        tower=tower,
        objective=objective_of(config.algorithm, sources),
        optimizer=optimizer,
        qk_clip=build_qk_clip(chunks, optimizer, config, device),
        expert_load=ExpertLoad(chunks, config.model, topology),
        weight_norms=build_weight_norms(model, optimizer, config.metrics, topology),
        data=data,
        sources=sources,
        reader=InputReader(data, topology, build_staging(device), tracker),
        tracker=tracker,
        claim=claim,
    )


def objective_of(algorithm: AlgorithmConfig | None, sources: Sequence[SourceSummary]) -> Objective:
    """What the run is trained for: the next token, or what its algorithm says."""
    names, media = [source.name for source in sources], with_media(sources)
    if algorithm is None:
        return NextToken(names, media)
    return PolicyGradient(
        names,
        media,
        ratio_low=algorithm.ratio_low,
        ratio_high=algorithm.ratio_high,
        ratio_penalty=algorithm.ratio_penalty,
        is_sequence=algorithm.form is PolicyForm.sequence,
    )


def build_tower(
    encoders: Sequence[EncoderReplica],
    pipeline: PipelinePlan,
    topology: Topology,
    tracker: PhaseTracker,
) -> Tower:
    """The tower of this rank: decoupled if it has a replica of the encoder, coupled otherwise."""
    if not encoders:
        return CoupledTower()
    (encoder,) = encoders
    return build_decoupled_tower(encoder, pipeline, topology, tracker)


def share_of(config: Config, topology: Topology) -> Share:
    """What this rank reads of each batch: words in the first and last stage alone."""
    is_first = topology.holds_first_chunk
    return Share(
        rank=topology.rank,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        reads=Reads(
            tokens=is_first,
            labels=topology.holds_last_chunk,
            pixels=is_first and config.dep.mode is DepMode.coupled,
        ),
    )


def connect(config: Config, topology: Topology, tracker: PhaseTracker) -> None:
    """Set up every communicator that the run will use. Called by every rank; one that does not come within
    `SET_UP_S` is named."""
    communicators = communicators_of(config.parallelism, config.dep, topology.world_size)
    if not communicators:
        return
    with watchdog_of(config, topology, tracker, SET_UP_S, "limit to set up"), tracker.setting_up():
        set_up(topology, communicators, tracker.phase, say)


def stall_watchdog(run: Run) -> StallWatchdog:
    """What ends the job if it makes no progress for `train.stall_timeout_s`; use it as a context manager."""
    timeout_s = run.config.train.stall_timeout_s
    return watchdog_of(run.config, run.topology, run.tracker, timeout_s, "train.stall_timeout_s")


def watchdog_of(
    config: Config, topology: Topology, tracker: PhaseTracker, timeout_s: float, limit: str
) -> StallWatchdog:
    """A watchdog of this rank, with a time limit and its name."""
    return StallWatchdog(
        tracker,
        RankStateStore(job_store(), topology.rank, topology.world_size),
        timeout_s=timeout_s,
        folder=Path(config.run.dir) / "logs",
        device_is_busy=lambda: has_work_left(topology.device),
        limit=limit,
    )
