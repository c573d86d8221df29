"""What activations take on the device and in the host, from the configuration alone; torch-free.

What a pass saves (`saved_tensors.py`) is stored by policy, by the rules of
`parallel/activations/saving_pass.py`, and held from forward to backward, as the schedule has it. A sequence
counts as one document.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from k25_train.config.schema import Config
from k25_train.config.vision import VisionPart
from k25_train.plan.layout import layout_of
from k25_train.plan.memory.saved_tensors import KERNELS, PassSizes, SavedTensor, SavedTensors
from k25_train.plan.passes import sample_of_passes
from parallel.activations.order import offload_order
from parallel.activations.policy import Policy
from parallel.activations.sizes import SMALLEST_OFFLOADED_BYTES, block_bytes, stored_bytes
from parallel.pipeline.schedule import Pass, PassKey

SMALL_HOST_BYTES = 1 << 30
"""Up to here, host memory is planned for the largest micro-batch that there can be: a few hundred tokens are
spread over experts, and over images, less evenly than any margin allows, and for a shrunk model that much is
nothing. Our choice."""


class StoredTensor(NamedTuple):
    """A saved tensor and what is done with it."""

    tensor: SavedTensor
    policy: Policy
    """`keep` where its name's policy does not apply."""
    device_bytes: int
    """Of one kept as it is, all the memory that it keeps from being freed."""
    host_bytes: int
    block_bytes: int
    """Host memory in whole blocks."""


class WaitingBytes(NamedTuple):
    """What tensors take while they wait."""

    device: int
    host: int
    blocks: int
    """Host memory in whole blocks."""

    @classmethod
    def of(cls, tensors: Iterable[StoredTensor]) -> "WaitingBytes":
        """Their sums."""
        device, host, blocks = 0, 0, 0
        for each in tensors:
            device += each.device_bytes
            host += each.host_bytes
            blocks += each.block_bytes
        return cls(device, host, blocks)


VISION_SHARE = 0.1
"""Share of tokens that are counted as images' where the first stage has a part of vision. Source: not
disclosed, our choice."""
NOTHING = WaitingBytes(0, 0, 0)


@dataclass(frozen=True, slots=True)
class OffloadBudget:
    """What the engine of one rank may use."""

    host_bytes: int
    device_bytes: int


@dataclass(frozen=True, slots=True)
class OffloadNeed:
    """What one rank offloads."""

    host_bytes: int
    """The most that is in the host at a time, in whole blocks."""
    batch_bytes: int
    """Of the largest batch."""
    micro_batch_bytes: float
    """Of a micro-batch in all of the rank's chunks, on average."""


def offload_budget(config: Config, stage: int) -> OffloadBudget:
    """The budgets of a rank of a pipeline stage: those given, or what its schedule needs, times the margin.

    On the device there is room for batches on their way back, one on its way out and the one in use.
    """
    return budget_for(config, offload_need(config, stage))


def budget_for(config: Config, need: OffloadNeed) -> OffloadBudget:
    """The budgets of a rank that offloads so much; see `offload_budget`."""
    activation = config.activation
    host = activation.host_margin * need.host_bytes
    device = activation.host_margin * (activation.passes_ahead + 2) * need.batch_bytes
    if activation.host_gib is not None:
        host = activation.host_gib * 2**30
    if activation.device_gib is not None:
        device = activation.device_gib * 2**30
    return OffloadBudget(host_bytes=math.ceil(host), device_bytes=math.ceil(device))


def offload_need(config: Config, stage: int) -> OffloadNeed:
    """What a rank of the stage is to have room for: tokens spread over experts evenly, but see
    `SMALL_HOST_BYTES`."""
    worst = need_of(config, stage, largest_sizes(config))
    return worst if worst.host_bytes <= SMALL_HOST_BYTES else need_of(config, stage, balanced_sizes(config))


def need_of(config: Config, stage: int, sizes: PassSizes) -> OffloadNeed:
    """What a rank of the stage offloads of micro-batches of this size."""
    passes = sample_of_passes(config, stage)
    stay = offload_order(passes, config.activation.passes_ahead).stay
    chunks = [WaitingBytes.of(tensors) for tensors in stage_tensors(config, stage, sizes)]

    def of(key: PassKey) -> WaitingBytes:
        return NOTHING if key in stay else chunks[key.vp_stage]

    copied = [of(each.key).host for each in passes if each.is_forward]
    return OffloadNeed(
        host_bytes=peak_held(passes, lambda key: of(key).blocks),
        batch_bytes=max(copied),
        micro_batch_bytes=sum(copied) * len(chunks) / len(copied),
    )


def peak_held(passes: Sequence[Pass], bytes_of: Callable[[PassKey], int]) -> int:
    """The most that the batches between their forward and the end of their backward take at a time."""
    held, peak = 0, 0
    for each in passes:
        num_bytes = bytes_of(each.key)
        held += num_bytes if each.is_forward else -num_bytes
        peak = max(peak, held)
    return peak


def balanced_sizes(config: Config, imbalance: float = 1.0) -> PassSizes:
    """A micro-batch whose tokens are spread over experts evenly, `VISION_SHARE` of them of images.

    Args:
        imbalance: how many times their share the rank's experts get; no more than all tokens arrive.
    """
    train, most = config.train, largest_sizes(config)
    even = train.micro_batch_size * train.seq_len * config.model.num_experts_per_token
    return _sizes(config, min(round(even * imbalance), most.expert_rows), VISION_SHARE, num_frames=1)


def largest_sizes(config: Config) -> PassSizes:
    """A micro-batch of which all tokens are of the longest video chunks, and go to as many of one rank's
    experts as they can."""
    local_experts = config.model.num_experts // config.parallelism.ep
    each = min(config.model.num_experts_per_token, local_experts)
    tokens = config.train.micro_batch_size * config.train.seq_len
    return _sizes(config, config.parallelism.ep * tokens * each, 1.0, config.model.vision.pos_emb_time)


def _sizes(config: Config, expert_rows: int, vision_share: float, num_frames: int) -> PassSizes:
    train, trained = config.train, config.vision_placement.trained_first_stage_parts
    vision_tokens = math.ceil(vision_share * train.seq_len * train.micro_batch_size)
    return PassSizes(
        documents=(train.seq_len,) * train.micro_batch_size,
        num_sequences=train.micro_batch_size,
        expert_rows=max(expert_rows, 1),
        local_experts=config.model.num_experts // config.parallelism.ep,
        patches=(VisionPart.tower in trained)
        * vision_tokens
        * num_frames
        * config.model.vision.merge_size**2,
        vision_tokens=(VisionPart.projector in trained) * vision_tokens,
    )


def saved_tensors(config: Config, sizes: PassSizes) -> SavedTensors:
    """The lists of what this configuration's passes save."""
    kernels, policies = KERNELS[config.cluster.device], config.activation.policies()
    return SavedTensors(config.model, config.train.dtype, kernels, policies, sizes)


def stage_tensors(
    config: Config, stage: int, sizes: PassSizes, *, offloads: bool = True
) -> list[list[StoredTensor]]:
    """[virtual stage] -> what a pass through that chunk stores; `offloads`: whether it leaves the device."""
    layout, lists, model = layout_of(config), saved_tensors(config, sizes), config.model
    found = []
    for vp_stage in range(layout.vpp):
        layers = layout.layer_ids(stage, vp_stage)
        saved = lists.first_chunk() if layout.is_first(stage, vp_stage) else []
        saved += lists.every_chunk() if layers else []
        for layer in layers:
            saved += lists.layer(is_moe=model.is_moe(layer))
        saved += lists.last_chunk() if layout.is_last(stage, vp_stage) else []
        found.append(store_all(config, saved, offloads=offloads))
    return found


def store_all(config: Config, tensors: Iterable[SavedTensor], *, offloads: bool = True) -> list[StoredTensor]:
    """What becomes of tensors by their names' policies; `offloads`: whether their batch leaves the device."""
    policies = config.activation.policies()
    return [store(tensor, policies[tensor.name], offloads=offloads) for tensor in tensors]


def store(tensor: SavedTensor, wanted: Policy, *, offloads: bool) -> StoredTensor:
    """What becomes of a tensor of which a policy is wanted; `SavingPass` is the other side of it."""
    if tensor.is_made_again:
        return StoredTensor(tensor, Policy.recompute, 0, 0, 0)
    compresses = wanted.compresses and tensor.may_be_rounded
    leaves = wanted.offloads and offloads and tensor.num_bytes >= SMALLEST_OFFLOADED_BYTES
    if not compresses:
        if leaves:
            host_bytes = tensor.num_bytes
            return StoredTensor(tensor, Policy.offload, 0, host_bytes, block_bytes(host_bytes))
        return StoredTensor(tensor, Policy.keep, tensor.memory_bytes, 0, 0)
    if not leaves:
        return StoredTensor(tensor, Policy.fp8, stored_bytes(tensor.shape), 0, 0)
    num_values = math.prod(tensor.shape)
    scale_bytes = stored_bytes(tensor.shape) - num_values
    blocks = block_bytes(num_values) + block_bytes(scale_bytes)
    return StoredTensor(tensor, Policy.fp8_offload, 0, num_values + scale_bytes, blocks)
