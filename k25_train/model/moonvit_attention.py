"""MoonViT-3D's bidirectional attention inside each item, in two implementations.

    per length    torch's scaled-dot-product attention, a call per length of items: CPU, float32 on CUDA
    varlen        torch.nn.attention.varlen, one call for all items: CUDA

Which one runs when is in `k25_train/plan/memory/kernels.py`. With a call per length in bfloat16, CUDA would
build a plan for each pair of a length and a number of items (cuDNN, about a second each, on the host), and
native resolution has thousands.

Shapes: P patches of all items, K patches whose keys are attended to, N heads, D head dim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from k25_train.model.moonvit_items import PackedItems
from k25_train.plan.memory.kernels import AttentionKernel
from parallel.host.upload import upload

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [P, N, D], keys and values [K, N, D] -> [P, N, D], over certain items."""


def attention_over(items: PackedItems, device: torch.device, kernel: AttentionKernel) -> Attend:
    """Attention inside each of these items, which every block of the tower calls.

    Queries of a part of an item also attend to the keys and values of its other parts, which it gathers.
    """
    if not items.segments:
        return _of_no_items
    if kernel is AttentionKernel.varlen:
        attend = _one_call(items, device)
    elif items.gather is not None:
        attend = partial(_of_equal_lengths, 1)
    else:
        attend = partial(_per_length, items.segments)
    return attend if items.gather is None else partial(_gathered, items.gather, attend)


def _of_no_items(_query: Tensor, _key: Tensor, value: Tensor) -> Tensor:
    return value


def _gathered(
    gather: Callable[[Tensor], Tensor], attend: Attend, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    return attend(query, *gather(torch.stack([key, value], dim=1)).unbind(1))


def _one_call(items: PackedItems, device: torch.device) -> Attend:
    """One call of FlashAttention for all items, or for a part and the whole of its item."""
    query_lengths = [length for length, num_items in items.segments for _ in range(num_items)]
    key_lengths = query_lengths if items.gather is None else [math.prod(items.grids[0])]
    query_bounds = _boundaries(query_lengths, device)
    key_bounds = query_bounds if items.gather is None else _boundaries(key_lengths, device)
    longest = max(query_lengths), max(key_lengths)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = varlen_attn(query, key, value, query_bounds, key_bounds, *longest)
        # A pair of tensors only where that is asked for.
        assert isinstance(attended, Tensor)
        return attended

    return attend


def _boundaries(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[number of lengths + 1] int32: patches before each and after the last."""
    before = [*itertools.accumulate(lengths, initial=0)]
    return upload(torch.tensor(before, dtype=torch.int32), device)


def _per_length(segments: Sequence[tuple[int, int]], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A call for the items of each length; `segments` as in `PackedItems`."""
    sizes = [length * num_items for length, num_items in segments]
    pieces = zip(segments, query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
    return torch.cat([_of_equal_lengths(num_items, *qkv) for (_, num_items), *qkv in pieces])


def _of_equal_lengths(num_items: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of `num_items` items of equal length, or of a part."""
    heads_first = (each.unflatten(0, (num_items, -1)).transpose(1, 2) for each in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2).flatten(0, 1)
