"""What DeepEP's kernels do, over gloo: each rank gets a token once, and adds up what comes back in float32.

Stands in for `fused_dispatch` and `fused_combine` of megatron-core's `transformer/moe/fused_a2a.py`.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Handle(NamedTuple):
    """Where the rows of a dispatch came from and went to."""

    sent: list[Tensor]
    """[rank] -> tokens of this rank that went there."""
    received: list[int]
    """[rank] -> rows that came from there."""


def exchange(parts: list[Tensor], sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send one part to each rank; returns what the ranks sent here, in their order."""
    rows = torch.cat(parts)
    got = rows.new_empty(sum(sizes), *rows.shape[1:])
    dist.all_to_all_single(got, rows.contiguous(), sizes, [len(each) for each in parts], group=group)
    return got


def add_up(rows: Tensor, handle: Handle, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
    """The way back: rows as received -> their sums for each of this rank's tokens."""
    parts = list(rows.split(handle.received))
    back = exchange(parts, [len(each) for each in handle.sent], group)
    total = torch.zeros(num_tokens, *rows.shape[1:], dtype=torch.float32)
    return total.index_add_(0, torch.cat(handle.sent), back.float()).to(rows.dtype)


class Dispatch(torch.autograd.Function):
    """Tokens to the ranks of their experts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, probs: Tensor, num_experts: int, group: Any) -> Any:
        local = num_experts // group.size()
        ranks = indices.div(local, rounding_mode="floor").masked_fill(indices < 0, -1)
        sent = [(ranks == rank).any(1).nonzero()[:, 0] for rank in range(group.size())]
        sizes = [torch.tensor([len(each)]) for each in sent]
        received = exchange(sizes, [1] * group.size(), group).tolist()
        handle = Handle(sent, received)
        rows = exchange([x[each] for each in sent], received, group)
        # Of other ranks' experts: -1, with a weight of zero.
        first = group.rank() * local
        theirs = exchange([indices[each] for each in sent], received, group) - first
        is_here = (theirs >= 0) & (theirs < local)
        weights = exchange([probs[each] for each in sent], received, group).masked_fill(~is_here, 0)
        chosen = theirs.masked_fill(~is_here, -1)
        counts = torch.bincount(chosen[is_here], minlength=local)
        ctx.handle, ctx.group, ctx.num_tokens, ctx.is_here = handle, group, len(x), is_here
        ctx.mark_non_differentiable(chosen, counts)
        return rows, chosen, weights, counts, handle

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        of_rows, _, of_weights, *_ = gradients
        of_weights = of_weights.masked_fill(~ctx.is_here, 0)
        sums = [add_up(each, ctx.handle, ctx.num_tokens, ctx.group) for each in (of_rows, of_weights)]
        return sums[0], None, sums[1], None, None


class Combine(torch.autograd.Function):
    """What the ranks made of their rows, added up for each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, handle: Handle, num_tokens: int, group: Any) -> Tensor:
        ctx.handle, ctx.group = handle, group
        return add_up(x, handle, num_tokens, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        parts = [gradients[0][each] for each in ctx.handle.sent]
        return exchange(parts, ctx.handle.received, ctx.group), None, None, None


def install() -> None:
    """Put the twin into megatron-core, in this process."""
    from megatron.core.transformer.moe import token_dispatcher

    num_tokens: list[int] = []

    def dispatch(x: Tensor, indices: Tensor, probs: Tensor, num_experts: int, group: Any, **_: Any) -> Any:
        num_tokens[:] = [len(x)]
        return Dispatch.apply(x, indices, probs, num_experts, group)

    def combine(x: Tensor, group: Any, handle: Handle, **_: Any) -> tuple[Tensor, None]:
        return Combine.apply(x, handle, num_tokens[0], group), None

    token_dispatcher.fused_dispatch, token_dispatcher.fused_combine = dispatch, combine
    token_dispatcher.set_deepep_num_sms = lambda _: None
