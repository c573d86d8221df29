"""What activations take on the device and in the host until their backward pass; torch-free.

What a pass saves (`saved_tensors.py`) is packed by policy, by the rules of
`parallel/activations/saving_pass.py`, and held from forward to backward, in the order of the schedule. A
sequence counts as one document.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from functools import partial
from typing import NamedTuple

from k25_train.config.schema import Config
from k25_train.plan.assumptions import OURS, Compute, OtherCode
from k25_train.plan.memory.kernels import configured_kernels
from k25_train.plan.memory.saved_tensor import SavedTensor
from k25_train.plan.memory.saved_tensors import SavedTensors
from k25_train.plan.pass_sizes import PassSizes
from k25_train.plan.pipeline import ChunkPlan, StagePlan
from parallel.activations.policy import Policy
from parallel.activations.sizes import SMALLEST_OFFLOADED_BYTES, block_bytes, fp8_bytes
from parallel.pipeline.schedule import Pass, PassKey

READ_BY_PRODUCTS = frozenset(
    ("mla.up_input", "moe.up_input", "moe.down_input", "shared_expert.down_input", "dense.down_input")
)
"""Activations that only products read."""


class PackedTensor(NamedTuple):
    """A saved tensor and what is done with it."""

    tensor: SavedTensor
    """The tensor as the forward pass made it."""
    policy: Policy
    """What is done with it: `keep` where the policy of its name does not apply."""
    device_bytes: int
    """Device memory; of a tensor that is kept unchanged, all that it keeps from being freed."""
    host_bytes: int
    """Bytes copied to the host."""
    block_bytes: int
    """Host memory in whole blocks."""


class Part(Enum):
    """A part of a chunk that saves tensors of its own."""

    first = "first chunk"
    chunk = "once per chunk"
    layer = "layer"
    last = "last chunk"
    mtp = "layer of multi-token prediction"


class WaitingBytes(NamedTuple):
    """What tensors take from forward to backward."""

    device: int
    """Device memory."""
    host: int
    """Bytes copied to the host."""
    blocks: int
    """Host memory in whole blocks."""

    @classmethod
    def of(cls, tensors: Iterable[PackedTensor]) -> "WaitingBytes":
        """The sums over tensors."""
        device, host, blocks = 0, 0, 0
        for each in tensors:
            device += each.device_bytes
            host += each.host_bytes
            blocks += each.block_bytes
        return cls(device, host, blocks)

    @classmethod
    def sum(cls, parts: Iterable["WaitingBytes"]) -> "WaitingBytes":
        """The sums over what was summed already."""
        each = list(parts)
        return cls(*(sum(of_part) for of_part in zip(*each, strict=True))) if each else cls(0, 0, 0)


def peak_held(passes: Sequence[Pass], bytes_of: Callable[[PassKey], int]) -> int:
    """The most that is held at a time, from each forward pass to the end of its backward pass."""
    held, peak = 0, 0
    for each in passes:
        num_bytes = bytes_of(each.key)
        held += num_bytes if each.is_forward else -num_bytes
        peak = max(peak, held)
    return peak


def peak_of_turns(
    stage: StagePlan, leaving: Sequence[int], staying: Sequence[int], *, frees_by_layer: bool = False
) -> int:
    """The same of a stage's passes, each of which holds `leaving` or `staying` bytes of its virtual stage,
    whichever it does.

    Where a forward pass runs overlapped with a backward pass, they go layer by layer: `frees_by_layer` says
    that the one frees a layer's tensors before the other makes those of its next layer (megatron-core 0.19.2,
    `model_chunk_schedule_plan.py`).
    """
    num_layers = [max(len(chunk.layers), 1) for chunk in stage.chunks]
    held, peak = 0.0, 0.0
    for forward, forward_stays, backward, backward_stays in stage.sampled_turns:
        made = freed = 0
        if forward >= 0:
            made = staying[forward] if forward_stays else leaving[forward]
        if backward >= 0:
            freed = staying[backward] if backward_stays else leaving[backward]
        most: float = made
        if frees_by_layer and forward >= 0 and backward >= 0:
            layers = min(num_layers[forward], num_layers[backward])
            most = max(made / layers, made - freed * (layers - 1) / layers)
        peak = max(peak, held + most)
        held += made - freed
    return round(peak)


def num_held(stage: StagePlan) -> int:
    """The most passes of a stage that are between forward and backward at a time."""
    each = [1] * len(stage.chunks)
    return peak_of_turns(stage, each, each)


def saved_tensors(config: Config, sizes: PassSizes, code: OtherCode = OURS) -> SavedTensors:
    """The lists of what this configuration's passes save."""
    kernels, policies = configured_kernels(config, code), config.activation.policies()
    return SavedTensors(config.model, config.train.dtype, kernels, policies, sizes)


def stage_tensors(stage: StagePlan, sizes: PassSizes, *, offloads: bool = True) -> list[list[PackedTensor]]:
    """[virtual stage] -> what a pass through that chunk saves; `offloads`: whether it leaves the device."""
    return [
        [packed for part in _parts(stage, chunk) for packed in part_tensors(stage, part, sizes, offloads)]
        for chunk in stage.chunks
    ]


def stage_waiting(stage: StagePlan, sizes: PassSizes, *, offloads: bool = True) -> list[WaitingBytes]:
    """[virtual stage] -> what these tensors take in sum."""
    return [
        WaitingBytes.sum(
            stage.memo.once(
                ("waiting", part, sizes, offloads),
                partial(_waiting, stage, part, sizes, offloads),
            )
            for part in _parts(stage, chunk)
        )
        for chunk in stage.chunks
    ]


def part_tensors(
    stage: StagePlan, part: tuple[Part, bool], sizes: PassSizes, offloads: bool
) -> tuple[PackedTensor, ...]:
    """What one part of a chunk saves, packed; stages have the same parts."""
    return stage.memo.once(("packed", part, sizes, offloads), lambda: _packed(stage, part, sizes, offloads))


def _waiting(stage: StagePlan, part: tuple[Part, bool], sizes: PassSizes, offloads: bool) -> WaitingBytes:
    return WaitingBytes.of(part_tensors(stage, part, sizes, offloads))


def _packed(
    stage: StagePlan, part: tuple[Part, bool], sizes: PassSizes, offloads: bool
) -> tuple[PackedTensor, ...]:
    code, (kind, has_experts) = stage.assumptions.code, part
    lists, model, runs_again = (
        saved_tensors(stage.config, sizes, code),
        stage.config.model,
        code.recomputes_layers,
    )
    # A layer of its kind.
    layer = model.num_layers - 1 if has_experts else 0
    saved = {
        Part.first: lists.first_chunk,
        Part.last: lists.last_chunk,
        Part.chunk: lambda: lists.every_chunk([layer]),
        Part.layer: lists.layer_input if runs_again else lambda: lists.layer(is_moe=has_experts),
        Part.mtp: lambda: lists.mtp(is_moe=has_experts, runs_again=runs_again),
    }[kind]()
    packed = pack_all(stage.config, saved, offloads=offloads)
    return tuple(map(_in_fp8, packed) if code.compute is Compute.fp8 else packed)


def _in_fp8(packed: PackedTensor) -> PackedTensor:
    """What products in FP8 keep of their inputs: the copy that they read, with a scale for each 32 numbers
    (MXFP8). What others read as well, as the router does a norm's output, is kept as it is."""
    tensor = packed.tensor
    if packed.policy is not Policy.keep or tensor.name not in READ_BY_PRODUCTS or not tensor.may_be_rounded:
        return packed
    return packed._replace(device_bytes=math.ceil(math.prod(tensor.shape) * 33 / 32))


def _parts(stage: StagePlan, chunk: ChunkPlan) -> Iterator[tuple[Part, bool]]:
    """What a chunk consists of, and whether there are experts in it."""
    kinds = [stage.config.model.is_moe(layer) for layer in chunk.layers]
    if chunk.is_first:
        yield Part.first, False
    if kinds:
        yield Part.chunk, any(kinds)
    for is_moe in kinds:
        yield Part.layer, is_moe
    if chunk.is_last:
        yield Part.last, False
        for _ in range(stage.assumptions.code.mtp_layers):
            yield Part.mtp, stage.config.model.is_moe(stage.config.model.num_layers - 1)


def pack_all(config: Config, tensors: Iterable[SavedTensor], *, offloads: bool = True) -> list[PackedTensor]:
    """What becomes of tensors by their names' policies; `offloads`: whether their pass leaves the device."""
    policies = config.activation.policies()
    return [pack(tensor, policies[tensor.name], offloads=offloads) for tensor in tensors]


def pack(tensor: SavedTensor, wanted: Policy, *, offloads: bool) -> PackedTensor:
    """What becomes of a tensor for which a policy is wanted; `SavingPass` does the same with real ones."""
    # 1. Recomputed: only its inputs are saved.
    if tensor.is_made_again:
        return PackedTensor(tensor, Policy.recompute, 0, 0, 0)
    compresses = wanted.compresses and tensor.may_be_rounded
    leaves = wanted.offloads and offloads and tensor.num_bytes >= SMALLEST_OFFLOADED_BYTES
    # 2. In its own format, in the host or on the device.
    if not compresses:
        if leaves:
            host_bytes = tensor.num_bytes
            return PackedTensor(tensor, Policy.offload, 0, host_bytes, block_bytes(host_bytes))
        return PackedTensor(tensor, Policy.keep, tensor.memory_bytes, 0, 0)
    # 3. In FP8; in the host, values and scales are separate blocks.
    if not leaves:
        return PackedTensor(tensor, Policy.fp8, fp8_bytes(tensor.shape), 0, 0)
    num_values = math.prod(tensor.shape)
    scale_bytes = fp8_bytes(tensor.shape) - num_values
    blocks = block_bytes(num_values) + block_bytes(scale_bytes)
    return PackedTensor(tensor, Policy.fp8_offload, 0, num_values + scale_bytes, blocks)
