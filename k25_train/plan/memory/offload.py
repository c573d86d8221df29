"""What a rank offloads, and the memory that its offload engine may use for it; torch-free."""

import math
from dataclasses import dataclass

from k25_train.config.activation import ActivationConfig
from k25_train.plan.memory.activations import peak_of_turns, stage_waiting
from k25_train.plan.pass_sizes import PassSizes
from k25_train.plan.pipeline import StagePlan
from k25_train.units import GIB

SMALL_HOST_BYTES = GIB
"""Up to here, host memory is planned for the largest micro-batch that there can be: a few hundred tokens are
spread over experts, and over images, less evenly than any margin allows, and for a shrunk model that much is
nothing. Source: not disclosed, our choice."""


@dataclass(frozen=True, slots=True)
class OffloadBudget:
    """What the offload engine of one rank may use."""

    host_bytes: int
    """Page-locked host memory."""
    device_bytes: int
    """Device memory of tensors on their way to the host and back."""


@dataclass(frozen=True, slots=True)
class OffloadNeed:
    """What one rank offloads."""

    host_bytes: int
    """The most that is in the host at a time, in whole blocks."""
    pass_bytes: int
    """Bytes of the pass with the most of them."""
    micro_batch_bytes: float
    """Bytes of a micro-batch in all of the rank's chunks, on average."""


def offload_budget(stage: StagePlan) -> OffloadBudget:
    """The budgets of a rank: those configured, or what its schedule needs, times the margin."""
    return budget_for(stage.config.activation, offload_need(stage))


def budget_for(activation: ActivationConfig, need: OffloadNeed) -> OffloadBudget:
    """The budgets of a rank that offloads so much.

    The device has room for the passes on their way back, one on its way out and the one in use.
    """
    host = activation.host_margin * need.host_bytes
    device = activation.host_margin * (activation.passes_ahead + 2) * need.pass_bytes
    if activation.host_gib is not None:
        host = activation.host_gib * GIB
    if activation.device_gib is not None:
        device = activation.device_gib * GIB
    return OffloadBudget(host_bytes=math.ceil(host), device_bytes=math.ceil(device))


def offload_need(stage: StagePlan) -> OffloadNeed:
    """What a rank must have room for: tokens spread evenly over experts, but see `SMALL_HOST_BYTES`."""
    worst = need_of(stage, stage.largest_sizes)
    return worst if worst.host_bytes <= SMALL_HOST_BYTES else need_of(stage, stage.balanced_sizes)


def need_of(stage: StagePlan, sizes: PassSizes) -> OffloadNeed:
    """What a rank of the stage offloads of micro-batches of this size."""
    chunks = stage_waiting(stage, sizes)
    nothing = [0] * len(chunks)
    copied = [
        0 if stays else chunks[vp_stage].host
        for vp_stage, stays, _, _ in stage.sampled_turns
        if vp_stage >= 0
    ]
    return OffloadNeed(
        host_bytes=peak_of_turns(stage, [chunk.blocks for chunk in chunks], nothing),
        pass_bytes=max(copied),
        micro_batch_bytes=sum(copied) * len(chunks) / len(copied),
    )
