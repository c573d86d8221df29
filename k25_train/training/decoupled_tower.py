"""The decoupled encoder of one rank, assembled: module, engines, and the readers of its items.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from k25_train.data.batch import MicroBatch, mask_failed
from k25_train.data.loader import DataLoader
from k25_train.data.mix.plan import StepPlan
from k25_train.data.vision_reader import StepVision, VisionReader
from k25_train.model.megatron_config import TORCH_DTYPE
from k25_train.plan.pipeline import PipelinePlan
from k25_train.plan.vision_planner import BubblePlanner, UpfrontPlanner, VisionPlanner
from k25_train.units import GIB
from parallel.config import DepSchedule, WireFormat
from parallel.dep.bubble_engine import BubbleEngine
from parallel.dep.engine import Engine, EngineSetup, VisionWork
from parallel.dep.feature_exchange import FeatureExchange
from parallel.dep.part_exchange import PartExchange
from parallel.dep.stats import VisionSummary
from parallel.dep.upfront_engine import UpfrontEngine
from parallel.megatron.replicas import EncoderReplica, reduce_gradients, start_gather
from parallel.topology import Topology
from parallel.watchdog.phases import PhaseTracker

WIRE_DTYPE = {WireFormat.float32: torch.float32, WireFormat.bfloat16: torch.bfloat16}


class DecoupledTower:
    """One rank's share of the decoupled encoder: a `Tower` whose replica is on every rank."""

    takes_pixels = False

    def __init__(
        self,
        encoder: EncoderReplica,
        engine: Engine,
        reader: VisionReader,
        evaluating: UpfrontEngine,
        heldout_reader: VisionReader,
        loader: DataLoader,
        topology: Topology,
    ) -> None:
        """
        Args:
            encoder: this rank's replica.
            engine: runs it in training steps.
            reader: plans and decodes for training steps.
            evaluating: runs it in evaluations, which have no backward pass to fill.
            heldout_reader: plans and decodes for evaluations.
            loader: counts the samples that do not decode.
        """
        self.encoder = encoder
        self.engine = engine
        self.reader = reader
        self.evaluating = evaluating
        self.heldout_reader = heldout_reader
        self._loader = loader
        self._topology = topology

    @property
    def replicas(self) -> Sequence[EncoderReplica]:
        """This rank's replica of the encoder."""
        return (self.encoder,)

    def read(self, plan: StepPlan) -> StepVision:
        """Divide the items of a global batch over all ranks and decode this rank's. May run in a thread."""
        return self.reader.read(plan)

    def read_heldout(self, plan: StepPlan) -> StepVision:
        """Do the same for an evaluation."""
        return self.heldout_reader.read(plan)

    def arrange(self, batches: Sequence[MicroBatch], vision: StepVision) -> list[MicroBatch]:
        """This replica's micro-batches in the order of the plan, without the loss of what did not decode."""
        # The planner may run micro-batches in another order: costly ones in the middle of the step.
        replica = self._topology.dp_rank
        ordered = [batches[number] for number in vision.order[replica]]
        failed = items_by_micro_batch(vision, self._share_failures(vision), replica, len(ordered))
        return [mask_failed(batch, items) for batch, items in zip(ordered, failed, strict=True)]

    def start(self, work: VisionWork) -> None:
        """Encode, balanced over all ranks, and send the features to the first stages."""
        start_gather(self.replicas)
        self.engine.start(work)

    def before_pass(self, num_done: int) -> None:
        """In bubbles, encode or go backward while the pipeline would wait."""
        self.engine.before_pass(num_done)

    def leaf(self, micro_batch: int) -> Tensor | None:
        """Features [V, D] of a micro-batch, whose gradient the engine collects; None if it has no items."""
        return self.engine.leaf(micro_batch)

    def finish(self, num_tokens: int) -> None:
        """Recompute and go backward; sum the encoder's gradients over all ranks, once."""
        self.engine.finish()
        reduce_gradients(self.encoder, num_tokens)

    def summary(self) -> VisionSummary:
        """Figures of the last step over all ranks."""
        return VisionSummary.over_all_ranks(self.engine.stats, self._topology.device)

    def _share_failures(self, vision: StepVision) -> list[int]:
        """The items of the global batch that did not decode, on whichever rank; the same on every rank.

        Each rank counts their samples, so that all stop together when there are too many (`DataError`); the
        first rank logs them.
        """
        # 1. One byte per item says whether it failed on any rank.
        topology = self._topology
        failed = torch.zeros(max(len(vision.items), 1), dtype=torch.uint8, device=topology.device)
        if vision.failures:
            failed[list(vision.failures)] = 1
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        items = failed.nonzero().flatten().tolist()
        if not items:
            return items
        # 2. Only if any did: the reasons, and the samples that they belong to.
        by_rank: list[dict[int, str]] = [{} for _ in range(topology.world_size)]
        dist.all_gather_object(by_rank, vision.failures)
        reasons = {item: reason for of_rank in by_rank for item, reason in of_rank.items()}
        for item in items:
            self._loader.skip_log.add(vision.items[item].record, reasons[item], log=topology.rank == 0)
        return items


def items_by_micro_batch(
    vision: StepVision, items: Sequence[int], replica: int, num_micro_batches: int
) -> list[list[int]]:
    """[micro-batch of a replica] -> those of `items` of the global batch that it holds, counted within it."""
    found: list[list[int]] = [[] for _ in range(num_micro_batches)]
    counted = [0] * num_micro_batches
    for number, item in enumerate(vision.work.plan.items if items else ()):
        if item.replica == replica:
            if number in items:
                found[item.micro_batch].append(counted[item.micro_batch])
            counted[item.micro_batch] += 1
    return found


def build_decoupled_tower(
    encoder: EncoderReplica,
    pipeline: PipelinePlan,
    topology: Topology,
    loader: DataLoader,
    tracker: PhaseTracker,
) -> DecoupledTower:
    """Build what runs this rank's replica of the encoder."""
    # 1. What every engine needs: the exchange of features, and limits.
    config = pipeline.config
    dtype, wire_format = TORCH_DTYPE[config.train.dtype], config.dep.exchange_dtype
    exchange = FeatureExchange(
        topology.features,
        topology.feature_gradients,
        topology.first_stage_ranks,
        width=config.vision_placement.feature_width,
        wire_dtype=dtype if wire_format is None else WIRE_DTYPE[wire_format],
        device=topology.device,
        phase=tracker.phase,
    )
    setup = EngineSetup(
        exchange=exchange,
        device=topology.device,
        feature_dtype=dtype,
        max_feature_bytes=int(config.dep.feature_buffer_gib * GIB),
        is_trained=bool(config.vision_placement.trained_encoder_parts),
        phase=tracker.phase,
    )

    def reader(planner: VisionPlanner) -> VisionReader:
        return VisionReader(
            loader.media,
            planner,
            micro_batch_size=config.train.micro_batch_size,
            rank=topology.rank,
            num_replicas=topology.dp_size,
            pin_memory=topology.device.type == "cuda",
        )

    # 2. Evaluations encode upfront, and so do steps unless they have bubbles to fill.
    upfront = UpfrontEngine(setup, encoder, PartExchange(topology.everyone, phase=tracker.phase))
    upfront_reader = reader(UpfrontPlanner(config))
    if config.dep.schedule is DepSchedule.upfront:
        return DecoupledTower(encoder, upfront, upfront_reader, upfront, upfront_reader, loader, topology)
    bubbles = BubbleEngine(setup, encoder, after_backward=encoder.start_grad_sync)
    bubble_reader = reader(BubblePlanner(pipeline, topology.rank))
    return DecoupledTower(encoder, bubbles, bubble_reader, upfront, upfront_reader, loader, topology)
