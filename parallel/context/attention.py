"""Attention to tokens of several ranks, by their latents.

Queries are the rank's own. The other tokens' keys and values would be 64 x 320 numbers each in Kimi K2.5;
what is exchanged instead is what they are made from, a latent of 576. Every rank makes keys and values from
latents block by block, attends to each block, and merges. Nothing but queries, the rank's own latents, its
output and a number per query and head is kept for the backward pass, which gets latents again, makes keys and
values again, and attends with what the whole softmax summed up to, so that each block's gradients are exact.

Shapes: t tokens of a rank, H heads, Q query/key head size, V value head size, C width of a latent, n tokens
of a block, q queries and K keys in a block, O x I the shape of the weight.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from parallel.context.blocks import KeyBlock
from parallel.context.exchange import LatentExchange
from parallel.context.merge import MergedAttention
from parallel.megatron.weight_gradient import SummedGradient
from parallel.megatron.wgrad import WeightGradients


class BlockKernel(Protocol):
    """Attention of queries to the keys of their segments, causal for a causal block (`KeyBlock`)."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, block: KeyBlock) -> tuple[Tensor, Tensor]:
        """Query [q, H, Q], key [K, H, Q], value [K, H, V] -> output [q, H, V], and the logarithm of the sum
        of the logits' exponentials, [q, H] float32."""

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        logsum: Tensor,
        block: KeyBlock,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, from that of the output, [q, H, V]; output and logarithms are
        those over all blocks."""

    def largest_logits(self, query: Tensor, key: Tensor, block: KeyBlock) -> Tensor:
        """Each head's largest softmax input, [H] float32."""


class KeysAndValues(Protocol):
    """How keys and values are made from latents with a weight."""

    @property
    def value_size(self) -> int:
        """V."""

    def make(self, latents: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Key [K, H, Q] and value [K, H, V] of latents [K, C]; weight [O, I]."""

    def backward(
        self, of_key: Tensor, of_value: Tensor, latents: Tensor, weight: Tensor, of_weight: Tensor
    ) -> Tensor:
        """Gradient of the latents, [K, C], from those of key and value; adds that of the weight to
        `of_weight` [O, I] float32."""


@dataclass(frozen=True, kw_only=True)
class ContextAttention:
    """All that attention of one layer to one micro-batch needs, but for tensors."""

    exchange: LatentExchange
    """Among the ranks that share the micro-batch."""
    blocks: Sequence[KeyBlock]
    """What the rank's queries attend to, in the exchange's order."""
    kernel: BlockKernel
    """Attends to a block."""
    keys_and_values: KeysAndValues
    """Makes keys and values."""
    wgrads: WeightGradients
    """Takes the weight's gradient."""
    measure: Callable[[Tensor], None]
    """Called with the largest logits of each head of each block, [H] float32, if `measures`."""
    measures: bool
    """Whether largest logits are wanted."""

    def __call__(self, query: Tensor, latents: Tensor, weight: nn.Parameter) -> Tensor:
        """Attend: query [t, H, Q], latents [t, C], weight [O, I] -> [t, H, V]; zeros for padding.

        A collective call of the ranks that share the micro-batch, and so is its backward pass: some input
        must need a gradient on all of them or on none.
        """
        output: Tensor = _Attention.apply(query, latents, weight, self)
        return output

    def _forward(self, query: Tensor, latents: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        merged = MergedAttention(len(query))

        def visit(number: int, of_block: Tensor) -> None:
            block = self.blocks[number]
            if not block.segments:
                return
            queries = query[block.rows]
            key, value = self.keys_and_values.make(of_block.index_select(0, block.keys), weight)
            if self.measures:
                self.measure(self.kernel.largest_logits(queries, key, block))
            merged.add(*self.kernel.forward(queries, key, value, block), block)

        self.exchange.forward(latents, visit)
        return merged.result(query, self.keys_and_values.value_size)

    def _backward(
        self, gradient: Tensor, query: Tensor, latents: Tensor, weight: Tensor, output: Tensor, logsum: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, latents, and weight, the latter in float32."""
        is_one_block = len(self.blocks) == 1
        of_query = torch.zeros_like(query, dtype=query.dtype if is_one_block else torch.float32)
        of_weight = torch.zeros_like(weight, dtype=torch.float32)

        def visit(number: int, of_block: Tensor) -> Tensor:
            block, found = self.blocks[number], torch.zeros_like(of_block, dtype=torch.float32)
            if not block.segments:
                return found
            rows = block.rows
            taken = of_block.index_select(0, block.keys)
            key, value = self.keys_and_values.make(taken, weight)
            for_queries, of_key, of_value = self.kernel.backward(
                gradient[rows], query[rows], key, value, output[rows], logsum[rows], block
            )
            of_query[rows] += for_queries
            of_taken = self.keys_and_values.backward(of_key, of_value, taken, weight, of_weight)
            return found.index_add_(0, block.keys, of_taken.float())

        of_latents = self.exchange.backward(latents, visit)
        return of_query.to(query.dtype), of_latents.to(latents.dtype), of_weight


class _Attention(torch.autograd.Function):
    """`ContextAttention` as one operation."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, latents: Tensor, weight: nn.Parameter, call: ContextAttention
    ) -> Tensor:
        output, logsum = call._forward(query, latents, weight)
        ctx.save_for_backward(query, latents, output, logsum)
        # A saved weight comes back without its attributes where hooks pack what is saved.
        ctx.weight, ctx.call = weight, call
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, latents, output, logsum = ctx.saved_tensors
        of_query, of_latents, total = ctx.call._backward(
            gradients[0], query, latents, ctx.weight, output, logsum
        )
        of_weight = None
        if ctx.needs_input_grad[2]:
            of_weight = ctx.call.wgrads.add(ctx.weight, SummedGradient(total))
        return of_query, of_latents, of_weight, None
