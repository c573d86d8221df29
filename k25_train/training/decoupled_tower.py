"""The decoupled encoder of one rank, assembled: module and engines.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from k25_train.model.megatron_config import TORCH_DTYPE
from k25_train.plan.pipeline import PipelinePlan
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

    def __init__(
        self,
        encoder: EncoderReplica,
        engine: Engine,
        evaluating: UpfrontEngine,
        device: torch.device,
    ) -> None:
        """
        Args:
            encoder: this rank's replica.
            engine: runs it in training steps.
            evaluating: runs it in evaluations, which have no backward pass to fill.
            device: where it is.
        """
        self.encoder = encoder
        self.engine = engine
        self.evaluating = evaluating
        self._device = device

    @property
    def replicas(self) -> Sequence[EncoderReplica]:
        """This rank's replica of the encoder."""
        return (self.encoder,)

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
        return VisionSummary.over_all_ranks(self.engine.stats, self._device)


def build_decoupled_tower(
    encoder: EncoderReplica,
    pipeline: PipelinePlan,
    topology: Topology,
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

    # 2. Evaluations encode upfront, and so do steps unless they have bubbles to fill.
    upfront = UpfrontEngine(setup, encoder, PartExchange(topology.everyone, phase=tracker.phase))
    if config.dep.schedule is DepSchedule.upfront:
        return DecoupledTower(encoder, upfront, upfront, topology.device)
    bubbles = BubbleEngine(setup, encoder, after_backward=encoder.start_grad_sync)
    return DecoupledTower(encoder, bubbles, upfront, topology.device)
