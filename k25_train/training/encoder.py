"""The decoupled encoder of one rank, put together: module, engine, and the reader of its items.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from k25_train.config.optimizer import TrainedVision
from k25_train.config.schema import Config
from k25_train.data.loader import DataLoader
from k25_train.data.prefetch import Prefetch
from k25_train.data.vision_reader import StepVision, VisionReader
from k25_train.model.megatron_config import TORCH_DTYPE
from k25_train.plan.time.step import feature_width
from k25_train.plan.vision_planner import BubblePlanner, UpfrontPlanner, VisionPlanner
from parallel.config import DepSchedule, WireFormat
from parallel.dep.bubble_engine import BubbleEngine
from parallel.dep.engine import Engine, EngineSetup
from parallel.dep.exchange import FeatureExchange
from parallel.dep.parts import PartExchange
from parallel.dep.stats import VisionSummary
from parallel.dep.upfront_engine import UpfrontEngine
from parallel.megatron.replicas import EncoderReplica
from parallel.topology import Topology
from parallel.watchdog.phases import PhaseTracker

WIRE_DTYPE = {WireFormat.float32: torch.float32, WireFormat.bfloat16: torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Vision:
    """One rank's share of the decoupled encoder."""

    encoder: EncoderReplica
    engine: Engine
    """Of training steps."""
    prefetch: Prefetch[int, StepVision]
    """[step, counted from 0] -> its items."""
    heldout_engine: UpfrontEngine
    """Of evaluations, which have no backward pass to fill."""
    heldout_reader: VisionReader

    def of_step(self, step: int, loader: DataLoader) -> StepVision:
        """The items of a training step, counted from 0; those of the next ones are read meanwhile."""
        return self.prefetch.get(step, loader.steps_ahead(step))

    def summary(self, topology: Topology) -> VisionSummary:
        """Figures of the last step over all ranks. Called by every rank."""
        return VisionSummary.over_all_ranks(self.engine.stats, topology.device)


def build_vision(
    encoder: EncoderReplica, config: Config, topology: Topology, loader: DataLoader, tracker: PhaseTracker
) -> Vision:
    """Build what runs this rank's replica of the encoder."""
    dtype, wire_format = TORCH_DTYPE[config.train.dtype], config.dep.exchange_dtype
    exchange = FeatureExchange(
        topology.features,
        topology.feature_gradients,
        topology.first_stage_ranks,
        width=feature_width(config),
        wire_dtype=dtype if wire_format is None else WIRE_DTYPE[wire_format],
        device=topology.device,
        phase=tracker.phase,
    )
    setup = EngineSetup(
        exchange=exchange,
        device=topology.device,
        feature_dtype=dtype,
        max_feature_bytes=int(config.dep.feature_buffer_gib * 2**30),
        is_trained=config.optim.vision.trained is TrainedVision.all,
        phase=tracker.phase,
    )
    upfront = UpfrontEngine(setup, encoder, PartExchange(topology.everyone, phase=tracker.phase))

    def reader(planner: VisionPlanner) -> VisionReader:
        return VisionReader(
            loader.media,
            config.model.vision,
            planner,
            micro_batch_size=config.train.micro_batch_size,
            rank=topology.rank,
            num_replicas=topology.dp_size,
            pin_memory=topology.device.type == "cuda",
        )

    heldout = reader(UpfrontPlanner(config))
    engine: Engine = upfront
    training = heldout
    if config.dep.schedule is DepSchedule.bubbles:
        training = reader(BubblePlanner(config, topology.rank))
        engine = BubbleEngine(setup, encoder, after_backward=encoder.start_grad_sync)

    def read(step: int) -> StepVision:
        return training.read(loader.plan(step).sequences)

    return Vision(encoder, engine, loader.prefetch(read), upfront, heldout)


def share_failures(vision: StepVision, loader: DataLoader, topology: Topology) -> list[int]:
    """The items of the global batch that did not decode, on whichever rank; the same on every rank.

    Each rank counts their samples, so that all stop together when there are too many (`DataError`); the first
    one logs them.
    """
    failed = torch.zeros(max(len(vision.places), 1), dtype=torch.uint8, device=topology.device)
    if vision.failures:
        failed[list(vision.failures)] = 1
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    items = failed.nonzero().flatten().tolist()
    if items:
        by_rank: list[dict[int, str]] = [{} for _ in range(topology.world_size)]
        dist.all_gather_object(by_rank, vision.failures)
        reasons = {item: reason for of_rank in by_rank for item, reason in of_rank.items()}
        for item in items:
            loader.skip_log.add(vision.places[item].record, reasons[item], log=topology.rank == 0)
    return items
