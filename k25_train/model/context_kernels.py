"""Attention of a rank's queries to a block of keys: what each kernel does of `BlockKernel`.

    CpuBlocks       torch's flash attention for the CPU, a call per segment and one more for its own keys
    Float32Blocks   torch's memory-efficient attention, a call per segment: float32 on CUDA
    VarlenBlocks    FlashAttention 2, one call for all segments: bfloat16 on CUDA

With Transformer Engine's layers, too, attention of ranks that share a micro-batch is FlashAttention 2:
cuDNN's plans are made for numbers of segments, queries and keys, which differ from block to block.

Shapes: q queries and K keys of all segments, H heads, Q query/key head size, V value head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Registers the operators.
from torch.nn.attention import varlen  # noqa: F401

from k25_train.model.max_logits import largest_logits, max_logits_per_head
from k25_train.plan.memory.kernels import AttentionKernel
from parallel.context.attention import BlockKernel
from parallel.context.blocks import KeyBlock
from parallel.context.merge import merged

aten = torch.ops.aten
CAUSAL = [-1, 0]
"""Of FlashAttention: all earlier keys, no later ones; the last key is the last query's own."""
ALL_KEYS = [-1, -1]
CAUSAL_FROM_LAST = 2
"""Of memory-efficient attention: the last key is the last query's own (`CausalFromBottomRight`)."""
ROWS_OF_SUMS = 32
"""Rows for which memory-efficient attention keeps a logarithm are filled up to a multiple."""


class _Part(NamedTuple):
    """Queries with keys that they attend to, in one call."""

    queries: slice
    keys: slice
    is_causal: bool


def _segments(block: KeyBlock) -> Iterator[_Part]:
    query = key = 0
    for segment in block.segments:
        queries, keys = slice(query, query + segment.queries), slice(key, key + segment.keys)
        yield _Part(queries, keys, block.is_causal)
        query, key = queries.stop, keys.stop


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[L, H, …] -> [1, H, L, …]."""
    return [each.transpose(0, 1).unsqueeze(0) for each in tensors]


def _tokens_first(tensor: Tensor) -> Tensor:
    """[1, H, L, …] -> [L, H, …]."""
    return tensor[0].transpose(0, 1)


def _filled_up(width: int, *tensors: Tensor) -> list[Tensor]:
    """Heads filled up with zeros to one width: to pad costs less than not to fuse."""
    return [F.pad(each, (0, width - each.shape[-1])) for each in tensors]


def _largest_by_segment(query: Tensor, key: Tensor, block: KeyBlock, scale: float) -> Tensor:
    maxima = [
        max_logits_per_head(
            query[part.queries].transpose(0, 1),
            key[part.keys].transpose(0, 1),
            scale,
            is_causal=part.is_causal,
        )
        for part in _segments(block)
    ]
    return torch.stack(maxima).amax(0)


@dataclass(frozen=True)
class CpuBlocks:
    """torch's flash attention for the CPU, which takes one head size.

    It aligns causal attention with the first key, so that earlier keys and a segment's own are apart.
    """

    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor, block: KeyBlock) -> tuple[Tensor, Tensor]:
        """See `BlockKernel`."""
        width = value.shape[-1]
        (value,) = _filled_up(query.shape[-1], value)
        outputs, sums = [], []
        for segment in _segments(block):
            found: list[tuple[Tensor, Tensor]] = []
            for part in _earlier_and_own(segment):
                rows = _heads_first(query[part.queries], key[part.keys], value[part.keys])
                output, logsum = aten._scaled_dot_product_flash_attention_for_cpu(
                    *rows, 0.0, part.is_causal, scale=self.scale
                )
                found.append((_tokens_first(output), _tokens_first(logsum)))
            output, logsum = found[0] if len(found) == 1 else merged(*found[0], *found[1])
            outputs.append(output[..., :width].to(query.dtype))
            sums.append(logsum)
        return torch.cat(outputs), torch.cat(sums)

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
        """See `BlockKernel`."""
        width = value.shape[-1]
        gradient, value, output = _filled_up(query.shape[-1], gradient, value, output)
        totals = [torch.zeros_like(each) for each in (query, key, value)]
        for segment in _segments(block):
            for part in _earlier_and_own(segment):
                of_queries = _heads_first(*(each[part.queries] for each in (gradient, query)))
                of_keys = _heads_first(key[part.keys], value[part.keys])
                merged_rows = _heads_first(output[part.queries], logsum[part.queries])
                found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    *of_queries, *of_keys, *merged_rows, 0.0, part.is_causal, scale=self.scale
                )
                for total, rows, each in zip(
                    totals, (part.queries, part.keys, part.keys), found, strict=True
                ):
                    total[rows] += _tokens_first(each)
        return totals[0], totals[1], totals[2][..., :width]

    def largest_logits(self, query: Tensor, key: Tensor, block: KeyBlock) -> Tensor:
        """See `BlockKernel`."""
        return _largest_by_segment(query, key, block, self.scale)


def _earlier_and_own(segment: _Part) -> Sequence[_Part]:
    """A causal segment as its earlier keys, to all of which it attends, and its own."""
    if not segment.is_causal:
        return [segment]
    first_own = segment.keys.stop - (segment.queries.stop - segment.queries.start)
    own = segment._replace(keys=slice(first_own, segment.keys.stop))
    if first_own == segment.keys.start:
        return [own]
    return [_Part(segment.queries, slice(segment.keys.start, first_own), False), own]


@dataclass(frozen=True)
class Float32Blocks:
    """torch's memory-efficient attention, which is the one that computes in float32 on CUDA."""

    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor, block: KeyBlock) -> tuple[Tensor, Tensor]:
        """See `BlockKernel`."""
        outputs, sums = [], []
        for part in _segments(block):
            rows = [each.unsqueeze(0) for each in (query[part.queries], key[part.keys], value[part.keys])]
            output, logsum, *_ = aten._efficient_attention_forward(
                *rows, None, None, None, None, None, 0.0, self._mask(part), True, scale=self.scale
            )
            outputs.append(output[0])
            sums.append(logsum[0, :, : output.shape[1]].T)
        return torch.cat(outputs), torch.cat(sums)

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
        """See `BlockKernel`."""
        totals = [torch.empty_like(each) for each in (query, key, value)]
        # There is no dropout.
        seed = torch.zeros((), dtype=torch.int64, device=query.device)
        for part in _segments(block):
            rows, keys = part.queries, part.keys
            num_queries, num_keys = rows.stop - rows.start, keys.stop - keys.start
            # Rows that do not exist sum up to infinity, so that nothing gets a weight.
            sums = F.pad(logsum[rows].T, (0, -num_queries % ROWS_OF_SUMS), value=torch.inf)
            found = aten._efficient_attention_backward(
                *(each.unsqueeze(0).contiguous() for each in (gradient[rows], query[rows], key[keys])),
                value[keys].unsqueeze(0),
                None,
                output[rows].unsqueeze(0).contiguous(),
                None,
                None,
                num_queries,
                num_keys,
                sums.unsqueeze(0).contiguous(),
                0.0,
                seed,
                seed,
                self._mask(part),
                False,
                scale=self.scale,
            )
            for total, where, each in zip(totals, (rows, keys, keys), found[:3], strict=True):
                total[where] = each[0]
        return totals[0], totals[1], totals[2]

    def largest_logits(self, query: Tensor, key: Tensor, block: KeyBlock) -> Tensor:
        """See `BlockKernel`."""
        return _largest_by_segment(query, key, block, self.scale)

    def _mask(self, part: _Part) -> int:
        return CAUSAL_FROM_LAST if part.is_causal else 0


@dataclass(frozen=True)
class VarlenBlocks:
    """One call of FlashAttention 2 (torch 2.13), which takes heads of one size, up to 256."""

    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor, block: KeyBlock) -> tuple[Tensor, Tensor]:
        """See `BlockKernel`."""
        width = value.shape[-1]
        (value,) = _filled_up(query.shape[-1], value)
        output, logsum, _ = torch.ops.torch_attn._varlen_attn(
            query, key, value, *block.bounds, *block.longest, block.is_causal, self.scale, self._window(block)
        )
        return output[..., :width], logsum.T

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
        """See `BlockKernel`."""
        width = value.shape[-1]
        gradient, value, output = _filled_up(query.shape[-1], gradient, value, output)
        of_query, of_key, of_value = torch.ops.torch_attn._varlen_attn_backward(
            gradient,
            query.contiguous(),
            key,
            value,
            output,
            logsum.T.contiguous(),
            *block.bounds,
            *block.longest,
            block.is_causal,
            # Of a dropout that there is not.
            torch.zeros(2, dtype=torch.uint64, device=query.device),
            self.scale,
            self._window(block),
        )
        return of_query, of_key, of_value[..., :width]

    def largest_logits(self, query: Tensor, key: Tensor, block: KeyBlock) -> Tensor:
        """See `BlockKernel`."""
        first, last = block.first_and_last_keys
        return largest_logits(query, key, first, last, self.scale)

    def _window(self, block: KeyBlock) -> list[int]:
        return CAUSAL if block.is_causal else ALL_KEYS


def block_kernel(kernel: AttentionKernel, scale: float) -> BlockKernel:
    """The kernel with which ranks that share a micro-batch attend, where one rank's would be `kernel`."""
    match kernel:
        case AttentionKernel.cpu:
            return CpuBlocks(scale)
        case AttentionKernel.float32:
            return Float32Blocks(scale)
        case AttentionKernel.varlen | AttentionKernel.transformer_engine:
            return VarlenBlocks(scale)
