"""Kernels that store activations in FP8 and bring them back, and bytes that wait in the host; torch-free."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from k25_train.plan.cause import Cause
from k25_train.plan.kernels.work import Setting, Work
from k25_train.plan.memory.activations import PackedTensor, pack_all
from k25_train.plan.memory.saved_tensors import SavedTensors
from parallel.activations.policy import Policy
from parallel.activations.sizes import fp8_bytes

IN_EXPERTS = ("moe.", "dense.")
"""Beginnings of names of activations that are made after tokens were sent to experts, or by a dense layer."""


def layer_tensors(setting: Setting, *, is_moe: bool) -> list[PackedTensor]:
    """What a decoder layer saves, packed by policy."""
    lists = SavedTensors(
        setting.config.model,
        setting.config.train.dtype,
        setting.kernels,
        setting.policies,
        setting.sizes,
    )
    return pack_all(setting.config, lists.layer(is_moe=is_moe))


def casts(setting: Setting, tensors: Iterable[PackedTensor], *, in_experts: bool) -> Iterator[Work]:
    """Rounding to FP8 in the forward pass and back in the backward pass, in one part of a layer."""
    for each in tensors:
        if each.policy not in (Policy.fp8, Policy.fp8_offload):
            continue
        if each.tensor.name == "moe.up_input" and setting.sends_fp8:
            # It has arrived in FP8.
            continue
        if each.tensor.name.startswith(IN_EXPERTS) is in_experts:
            num_bytes = each.tensor.num_bytes + fp8_bytes(each.tensor.shape)
            for work in setting.moved(f"{each.tensor.name} in FP8", num_bytes, num_bytes):
                yield replace(work, cause=Cause.storage)


def host_bytes(tensors: Iterable[PackedTensor]) -> int:
    """Bytes that are copied to the host, and back."""
    return sum(each.host_bytes for each in tensors)
