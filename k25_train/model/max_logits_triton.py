"""The largest attention logits on CUDA: one launch for all documents, whose logits never reach memory.

A program takes a block of queries of one head, and goes through the keys from the first to the last that any
of them attends to. So a layer costs the products of queries and keys, a sixth of what
attention itself multiplies forward and backward with heads of 192 and 128, and memory for one number a block
and head, whatever the documents.

Triton's products want dimensions that are powers of two. A head's size is divided into the largest of them
and a rest that is filled up, which for MLA's 128 + 64 wastes nothing.

Shapes: T queries, K keys, H heads, Q query/key head size, B blocks of queries.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

QUERY_BLOCK, KEY_BLOCK = 128, 128
COMPILE_OPTIONS = {"num_warps": 8, "num_stages": 3}
"""A pipeline of three blocks of keys takes 196 KB of an SM's 232."""
SMALLEST = 16
"""Least size of a dimension of Triton's products."""


def head_parts(head_size: int) -> tuple[int, int]:
    """The head size as a power of two and a rest filled up to one, at least 16 each; the rest may be 0."""
    whole = max(SMALLEST, 1 << (head_size.bit_length() - 1))
    rest = max(head_size - whole, 0)
    return whole, rest and max(SMALLEST, triton.next_power_of_2(rest))


@triton.jit
def max_logits_kernel(
    query: tl.tensor,
    key: tl.tensor,
    first_keys: tl.tensor,
    last_keys: tl.tensor,
    maxima: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    query_row: tl.tensor,
    query_head: tl.tensor,
    key_row: tl.tensor,
    key_head: tl.tensor,
    head_size: tl.constexpr,
    whole: tl.constexpr,
    rest: tl.constexpr,
    query_block: tl.constexpr,
    key_block: tl.constexpr,
) -> None:
    """The largest q·k of a block of queries and head: [T, H, Q], [K, H, Q], [T] twice -> [B, H] float32."""
    # 1. This block's queries. The last blocks of long documents have most to do and begin first.
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    rows = block * query_block + tl.arange(0, query_block)
    row_exists = rows < num_queries
    first = tl.load(first_keys + rows, mask=row_exists, other=num_keys)
    last = tl.load(last_keys + rows, mask=row_exists, other=-1)
    columns = tl.arange(0, whole)
    # Offsets of elements exceed 32 bits; rows and columns do not.
    query_rows = query + head * query_head + rows.to(tl.int64)[:, None] * query_row
    key_columns = key + head * key_head
    queries = tl.load(
        query_rows + columns[None, :], mask=row_exists[:, None] & (columns < head_size)[None, :], other=0.0
    )
    if rest > 0:
        more = whole + tl.arange(0, rest)
        rest_queries = tl.load(
            query_rows + more[None, :], mask=row_exists[:, None] & (more < head_size)[None, :], other=0.0
        )
    # 2. All keys that any of them attends to.
    best = tl.full([query_block], -float("inf"), tl.float32)
    begin = tl.min(first) // key_block * key_block
    end = tl.minimum(tl.max(last) + 1, num_keys)
    for start in range(begin, end, key_block):
        keys = start + tl.arange(0, key_block)
        exists = (keys < num_keys)[None, :]
        key_rows = key_columns + keys.to(tl.int64)[None, :] * key_row
        other = tl.load(key_rows + columns[:, None], mask=exists & (columns < head_size)[:, None], other=0.0)
        logits = tl.dot(queries, other, input_precision="ieee")
        if rest > 0:
            other = tl.load(key_rows + more[:, None], mask=exists & (more < head_size)[:, None], other=0.0)
            logits = tl.dot(rest_queries, other, logits, input_precision="ieee")
        # A maximum would drop NaN.
        logits = tl.where(logits != logits, float("inf"), logits)
        attends = exists & (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
        best = tl.maximum(best, tl.max(tl.where(attends, logits, -float("inf")), axis=1))
    # 3. One number for the block.
    tl.store(maxima + block * tl.num_programs(1) + head, tl.max(best))


def launch(query: Tensor, key: Tensor, first_keys: Tensor, last_keys: Tensor, scale: float) -> Tensor:
    """The largest softmax input of each head, [H] float32: what `max_logits.largest_logits` returns."""
    num_queries, num_heads, head_size = query.shape
    num_blocks = triton.cdiv(num_queries, QUERY_BLOCK)
    maxima = torch.empty(num_blocks, num_heads, dtype=torch.float32, device=query.device)
    whole, rest = head_parts(head_size)
    # Elements of a head are neighbours.
    query, key = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key))
    max_logits_kernel[(num_blocks, num_heads)](
        query,
        key,
        first_keys,
        last_keys,
        maxima,
        num_queries,
        len(key),
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        head_size=head_size,
        whole=whole,
        rest=rest,
        query_block=QUERY_BLOCK,
        key_block=KEY_BLOCK,
        **COMPILE_OPTIONS,
    )
    # A positive scale commutes with the maximum.
    return maxima.amax(0) * scale
