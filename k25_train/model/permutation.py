"""Rows of tokens sorted by expert, and back: each token's copies are added up in float32, in a fixed order.

megatron-core adds them with `scatter_add_`, on CUDA by atomic operations in the tokens' own type: in bfloat16
the sum of eight has an error of 3.7e-3 (rms) instead of 1.7e-3, and another one in each run. Here a token's
rows are gathered and added up one after the other, by `embedding_bag`, whose kernels for CUDA and CPU keep
the sum in float32 and visit the rows in the order that they are given in (torch 2.13,
`aten/src/ATen/native/cuda/EmbeddingBag.cu`). Transformer Engine's kernels, which replace these with
`train.transformer_engine`, add in float32 and in this order, too (2.20, `common/triton/permutation.py`).

Nothing here waits for the device: the numbers of rows are known to the host.

Shapes: T tokens, D hidden, E experts of the layer, N pairs of a token and an expert that it is sent to.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SUM = 0
"""`embedding_bag`'s number for adding up."""


@dataclass(frozen=True, slots=True)
class Routes:
    """Which expert gets a row of which token."""

    pairs: Tensor
    """[N] token * E + expert of each row, sorted by expert, then by token."""
    rows: Tensor
    """[N] rows sorted by token, then by expert."""
    starts: Tensor
    """[T] the first of a token's rows, as an index of `rows`; those of the next token follow."""
    num_experts: int

    @classmethod
    def of(cls, routing_map: Tensor, num_pairs: int) -> "Routes":
        """Of a map [T, E] bool with `num_pairs` chosen experts in all."""
        num_experts = routing_map.shape[1]
        # Of a known size, so that nothing waits for it.
        experts_N, tokens_N = torch.nonzero_static(routing_map.T.contiguous(), size=num_pairs).unbind(1)
        pairs_N = tokens_N * num_experts + experts_N
        counts_T = routing_map.sum(1)
        return cls(pairs_N, pairs_N.argsort(), counts_T.cumsum(0) - counts_T, num_experts)


def rows_of_experts(tokens: Tensor, probs: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:
    """tokens [T, D] and probs [T, E] -> a row for each pair, sorted by expert: [N, D], and its weight [N]."""
    return _Send.apply(tokens, probs, routes.pairs, routes.rows, routes.starts)


def sums_of_tokens(rows: Tensor, routes: Routes) -> Tensor:
    """rows [N, D], sorted by expert -> the sum of each token's, [T, D]; zeros for one without any."""
    return _Combine.apply(rows, routes.pairs, routes.rows, routes.starts, routes.num_experts)


def reorder(order: Tensor, inverse: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """Each of `rows` [R, ...] in another order: the first is `rows[order[0]]`; `inverse` leads back."""
    return _Reorder.apply(order, inverse, *rows)


def order_by_expert(sizes: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """How rows received rank by rank get sorted by expert, and back.

    Args:
        sizes: [ranks, local experts] rows that came from each rank for each expert, in that order.
        num_rows: their sum.

    Returns two permutations [num_rows].
    """
    # Each chunk's first row among the received and among the sorted ones, in sorted order.
    received = sizes.flatten()
    starts = (received.cumsum(0) - received).view_as(sizes).T.flatten()
    sorted_sizes = sizes.T.flatten()
    shifts = starts - (sorted_sizes.cumsum(0) - sorted_sizes)
    position = torch.arange(num_rows, device=sizes.device)
    order = position + shifts.repeat_interleave(sorted_sizes, output_size=num_rows)
    return order, torch.empty_like(order).scatter_(0, order, position)


def _add_up(rows: Tensor, rows_N: Tensor, starts_T: Tensor) -> Tensor:
    """rows [N, D] -> sums [T, D] in float32, or the rows' own type if that is wider, rounded to it once."""
    if not len(rows_N):
        return rows.new_zeros(len(starts_T), rows.shape[1])
    # The CPU's kernel for bfloat16 (FBGEMM) would round halves up; CUDA's rounds them to even.
    is_rounded_by_hand = rows.device.type == "cpu" and rows.dtype is torch.bfloat16
    terms = rows.float() if is_rounded_by_hand else rows
    return torch.embedding_bag(terms, rows_N, starts_T, False, SUM)[0].to(rows.dtype)


class _Send(torch.autograd.Function):
    """Copies tokens to the rows of their experts; backward adds the rows' gradients up."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, probs: Tensor, pairs_N: Tensor, rows_N: Tensor, starts_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pairs_N, rows_N, starts_T)
        ctx.shape = probs.shape
        tokens_N = pairs_N.div(probs.shape[1], rounding_mode="floor")
        return tokens.index_select(0, tokens_N), probs.flatten().index_select(0, pairs_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        of_rows, of_weights = gradients
        pairs_N, rows_N, starts_T = ctx.saved_tensors
        of_probs = of_weights.new_zeros(ctx.shape[0] * ctx.shape[1]).scatter_(0, pairs_N, of_weights)
        return _add_up(of_rows.contiguous(), rows_N, starts_T), of_probs.view(ctx.shape), None, None, None


class _Combine(torch.autograd.Function):
    """Adds up the rows of each token; backward copies the sum's gradient to each."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, pairs_N: Tensor, rows_N: Tensor, starts_T: Tensor, num_experts: int
    ) -> Tensor:
        ctx.save_for_backward(pairs_N)
        ctx.num_experts = num_experts
        return _add_up(rows.contiguous(), rows_N, starts_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (pairs_N,) = ctx.saved_tensors
        tokens_N = pairs_N.div(ctx.num_experts, rounding_mode="floor")
        return gradients[0].index_select(0, tokens_N), None, None, None, None


class _Reorder(torch.autograd.Function):
    """A permutation of rows; backward is the inverse, without adding anything up."""

    @staticmethod
    def forward(ctx: Any, order: Tensor, inverse: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(inverse)
        return tuple(each.index_select(0, order) for each in rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return None, None, *(gradient.index_select(0, inverse) for gradient in gradients)
