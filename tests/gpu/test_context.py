"""Kernels with which ranks that share a micro-batch attend, on a GPU against the CPU's, without waiting.

Parity of training over NCCL is in `tests/distributed/test_parity.py`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from k25_train.model.attention_kernels import HeadSizes
from k25_train.model.context_kernels import block_kernel
from k25_train.plan.memory.kernels import AttentionKernel
from parallel.context.attention import BlockKernel
from parallel.context.blocks import ContextShard, KeyBlock
from parallel.context.merge import MergedAttention
from parallel.context.plan import ContextPlan, plan_context

pytestmark = pytest.mark.gpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SCALE = 0.1
KIMI_K2_5, TINY = HeadSizes(4, 192, 128), HeadSizes(2, 24, 16)
BATCHES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((4096,), ()),
    ((1000, 3, 300, 1, 744), (1, 4)),
    ((1,) * 64, ()),
    ((5, 150, 40, 20, 41), (4,)),
]
"""Documents, and which of them are padding."""
DTYPES = {AttentionKernel.varlen: torch.bfloat16, AttentionKernel.float32: torch.float32}
BOUNDS = {AttentionKernel.varlen: 1e-2, AttentionKernel.float32: 1e-4}
"""Largest distance from the CPU's float32, relative to all numbers of a tensor: what bfloat16 rounds; what
products on tensor cores do, each in three parts."""


class Found(NamedTuple):
    """Of a rank's queries and all its blocks."""

    outputs: list[Tensor]
    """Of each block, [q, H, V]."""
    logsums: list[Tensor]
    """Of each block, [q, H]."""
    maxima: list[Tensor]
    """Of each block, [H]."""
    merged: Tensor
    """[t, H, V]."""
    gradients: list[Tensor]
    """Of queries, keys and values of each block."""


def orders(num_ranks: int, rank: int) -> dict[str, tuple[tuple[int, ...], ...]]:
    """In which blocks the tokens of ranks come, for each exchange."""
    ring = tuple(((rank - step) % num_ranks,) for step in range(num_ranks))
    return {"all_gather": (tuple(range(num_ranks)),), "ring": ring}


def values_of(plan: ContextPlan, heads: HeadSizes) -> list[Tensor]:
    """Query, key, value, and gradient of the output, of all ranks' tokens: [S, t, H, …], which bfloat16 can
    hold, so that all kernels begin with the same numbers."""
    torch.manual_seed(0)
    widths = (heads.query, heads.query, heads.value, heads.value)
    shape = len(plan.pieces), plan.num_tokens, heads.num_heads
    return [torch.randn(*shape, width).bfloat16() for width in widths]


def attend(
    kernel: BlockKernel, blocks: Sequence[KeyBlock], rank: int, values: Sequence[Tensor]
) -> Found | None:
    """What `ContextAttention` asks of a kernel; None where nothing attends to anything."""
    query, gradient = values[0][rank], values[3][rank]
    attended = [block for block in blocks if block.segments]
    if not attended:
        return None
    keys = [
        [each[list(block.sources)].flatten(0, 1)[block.keys] for each in values[1:3]] for block in attended
    ]
    merged, parts, maxima = MergedAttention(len(query)), [], []
    for block, of_block in zip(attended, keys, strict=True):
        parts.append(kernel.forward(query[block.rows], *of_block, block))
        maxima.append(kernel.largest_logits(query[block.rows], of_block[0], block))
        # What is merged in place stays apart from what is compared.
        merged.add(*(each.clone() for each in parts[-1]), block)
    output, logsum = merged.result(query, values[2].shape[-1])
    gradients: list[Tensor] = []
    for block, of_block in zip(attended, keys, strict=True):
        rows = block.rows
        gradients += kernel.backward(
            gradient[rows], query[rows], *of_block, output[rows], logsum[rows], block
        )
    return Found([part[0] for part in parts], [part[1] for part in parts], maxima, output, gradients)


def on_device(
    kernel: AttentionKernel, device: torch.device, plan: ContextPlan, heads: HeadSizes
) -> Iterator[tuple[str, Found | None]]:
    """What each rank finds with each exchange."""
    dtype = DTYPES.get(kernel, torch.float32)
    values = [each.to(device, dtype) for each in values_of(plan, heads)]
    for rank in range(len(plan.pieces)):
        for name, order in orders(len(plan.pieces), rank).items():
            blocks = ContextShard(plan, rank, device).blocks(order)
            yield f"{name}, rank {rank}", attend(block_kernel(kernel, SCALE), blocks, rank, values)


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """How far tensors are from those expected, relative to the largest of these: gradients of queries with
    one key each are 0 but for rounding."""
    size = max(float(each.norm()) for each in expected)
    pairs = zip(found, expected, strict=True)
    return max(float((one.cpu().float() - other).norm()) for one, other in pairs) / size


@pytest.mark.parametrize("kernel", DTYPES)
@pytest.mark.parametrize("heads", [KIMI_K2_5, TINY], ids=["Kimi K2.5's heads", "tiny heads"])
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(("lengths", "padding"), BATCHES)
def test_blocks_are_attended_to_as_on_the_cpu(
    kernel: AttentionKernel,
    heads: HeadSizes,
    num_ranks: int,
    lengths: tuple[int, ...],
    padding: tuple[int, ...],
) -> None:
    plan = plan_context(lengths, padding, num_ranks)
    expected_all = on_device(AttentionKernel.cpu, CPU, plan, heads)
    bound = BOUNDS[kernel]
    for (case, found), (_, expected) in zip(on_device(kernel, CUDA, plan, heads), expected_all, strict=True):
        assert (found is None) == (expected is None), case
        if found is None or expected is None:
            continue
        for name in ("outputs", "gradients"):
            assert distance(getattr(found, name), getattr(expected, name)) < bound, (case, name)
        assert distance([found.merged], [expected.merged]) < bound, case
        # Logits are float32 in both, of the same numbers.
        for logsum, other in zip(found.logsums, expected.logsums, strict=True):
            assert logsum.dtype == torch.float32
            torch.testing.assert_close(logsum.cpu(), other, rtol=1e-4, atol=1e-4)
        for largest, other in zip(found.maxima, expected.maxima, strict=True):
            assert largest.dtype == torch.float32
            torch.testing.assert_close(largest.cpu(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", DTYPES)
def test_blocks_are_made_and_attended_to_without_waiting_for_the_device(kernel: AttentionKernel) -> None:
    plan = plan_context((5, 150, 40, 20, 41), (4,), 2)
    # Kernels are loaded, and page-locked memory is allocated, at first use.
    list(on_device(kernel, CUDA, plan, KIMI_K2_5))
    values = [each.to(CUDA, DTYPES[kernel]) for each in values_of(plan, KIMI_K2_5)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rank in range(2):
            for order in orders(2, rank).values():
                blocks = ContextShard(plan, rank, CUDA).blocks(order)
                for block in (each for each in blocks if each.segments):
                    of_block = [values[each][rank].repeat(2, 1, 1)[block.keys] for each in (1, 2)]
                    query, gradient = (values[each][rank][block.rows] for each in (0, 3))
                    attention = block_kernel(kernel, SCALE)
                    output, logsum = attention.forward(query, *of_block, block)
                    attention.largest_logits(query, of_block[0], block)
                    attention.backward(gradient, query, *of_block, output, logsum, block)
    finally:
        torch.cuda.set_sync_debug_mode("default")
