"""What kernels for CUDA are called with where ranks share documents, and what torch says that they return.

Tensors have no memory: operators bind arguments by their schemas and give shapes by torch's own rules. The
checks are those that the kernels make at run time (torch 2.13: `flash_api.cpp`, `attention.cu`,
`attention_backward.cu`), where a machine without a GPU does not see them.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from k25_train.model.context_kernels import Float32Blocks, VarlenBlocks
from parallel.context.blocks import ContextShard, KeyBlock
from parallel.context.plan import plan_context
from tests.helpers.fake_cuda import gradients_of_efficient_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HEADS, QUERY, VALUE = 4, 192, 128
PLAN = plan_context((5, 150, 40, 20, 41), {4}, 2)
ORDERS: list[tuple[tuple[int, ...], ...]] = [((0, 1),), ((0,), (1,)), ((1,), (0,))]
BLOCKS = [
    block
    for rank in (0, 1)
    for order in ORDERS
    for block in ContextShard(PLAN, rank, CPU).blocks(order)
    if block.segments
]
FLASH = "torch_attn._varlen_attn", "torch_attn._varlen_attn_backward"
EFFICIENT = "aten._efficient_attention_forward", "aten._efficient_attention_backward"


class Recorded(TorchDispatchMode):
    """The arguments of attention's operators, by name, and how often a value is read."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        assert name != "aten._local_scalar_dense", "a value is read"
        if "_attn" in name or "_attention" in name:
            names = [argument.name for argument in func._schema.arguments]
            self.calls.append((name, dict(zip(names, args, strict=False)) | (kwargs or {})))
        if name == EFFICIENT[1]:
            return gradients_of_efficient_attention(*args)
        return func(*args, **kwargs or {})


def on_cuda(block: KeyBlock, mode: FakeTensorMode) -> KeyBlock:
    """The block with indices on a GPU."""
    rows = block.rows if isinstance(block.rows, slice) else mode.from_tensor(block.rows).to(CUDA)
    return replace(
        block,
        rows=rows,
        keys=mode.from_tensor(block.keys).to(CUDA),
        bounds=mode.from_tensor(block.bounds).to(CUDA),
    )


def calls_of(kernel: Any, block: KeyBlock, dtype: torch.dtype) -> list[tuple[str, dict[str, Any]]]:
    """Attend forward and backward; what is returned is checked here."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, Recorded() as recorded:
        block = on_cuda(block, mode)
        queries, keys = block.num_queries, len(block.keys)
        query, key, value, gradient, merged = (
            torch.empty(rows, HEADS, width, dtype=dtype, device=CUDA)
            for rows, width in (
                (queries, QUERY), (keys, QUERY), (keys, VALUE), (queries, VALUE), (queries, VALUE)
            )
        )  # fmt: skip
        output, logsum = kernel.forward(query, key, value, block)
        assert output.shape == (queries, HEADS, VALUE) and output.dtype == dtype
        assert logsum.shape == (queries, HEADS) and logsum.dtype == torch.float32
        # Logarithms come to the backward pass as they are saved: by queries.
        found = kernel.backward(gradient, query, key, value, merged, logsum.contiguous(), block)
        assert [each.shape for each in found] == [query.shape, key.shape, value.shape]
        assert {each.dtype for each in found} == {dtype}
        assert all(each.device == CUDA for each in (output, logsum, *found))
    return recorded.calls


def assert_rows(tensors: dict[str, Any], names: str, dtype: torch.dtype) -> None:
    for name in names.split():
        tensor = tensors[name]
        assert (tensor.device, tensor.dtype, tensor.stride(-1)) == (CUDA, dtype, 1), name


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_flash_attention_gets_what_it_takes(block: KeyBlock) -> None:
    forward, backward = calls_of(VarlenBlocks(0.1), block, torch.bfloat16)
    assert (forward[0], backward[0]) == FLASH
    for call in (forward[1], backward[1]):
        assert_rows(call, "query key value", torch.bfloat16)
        assert call["query"].shape[1:] == call["key"].shape[1:] == call["value"].shape[1:] == (HEADS, QUERY)
        assert QUERY % 8 == 0 and QUERY <= 256
        for name in ("cu_seq_q", "cu_seq_k"):
            bounds = call[name]
            assert (bounds.dtype, bounds.device, bounds.is_contiguous()) == (torch.int32, CUDA, True)
            assert bounds.shape == (len(block.segments) + 1,)
        assert (type(call["max_q"]), type(call["max_k"])) == (int, int)
        assert (call["max_q"], call["max_k"]) == tuple(map(max, zip(*block.segments, strict=True)))
        assert call["is_causal"] is block.is_causal and call["scale"] == 0.1
        assert call["window_size"] == [-1, 0 if block.is_causal else -1]
    assert_rows(backward[1], "grad_out out", torch.bfloat16)
    sums = backward[1]["lse"]
    assert sums.shape == (HEADS, block.num_queries) and sums.is_contiguous() and sums.dtype == torch.float32
    assert backward[1]["rng_state"].dtype == torch.uint64


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_memory_efficient_attention_gets_what_it_takes(block: KeyBlock) -> None:
    calls = calls_of(Float32Blocks(0.1), block, torch.float32)
    num_segments = len(block.segments)
    assert [name for name, _ in calls] == [*[EFFICIENT[0]] * num_segments, *[EFFICIENT[1]] * num_segments]
    for (name, call), segment in zip(calls, block.segments * 2, strict=True):
        assert_rows(call, "query key value", torch.float32)
        shapes = [tuple(call[each].shape) for each in ("query", "key", "value")]
        expected = (segment.queries, QUERY), (segment.keys, QUERY), (segment.keys, VALUE)
        assert shapes == [(1, rows, HEADS, width) for rows, width in expected]
        # 2 aligns with the last key.
        assert call["custom_mask_type"] == (2 if block.is_causal else 0)
        assert (
            call["dropout_p"] == 0.0 and call["bias"] is call["cu_seqlens_q"] is call["cu_seqlens_k"] is None
        )
        if name == EFFICIENT[1]:
            assert_rows(call, "grad_out_ out", torch.float32)
            assert (call["max_seqlen_q"], call["max_seqlen_k"]) == segment
            assert call["logsumexp"].shape == (1, HEADS, -(-segment.queries // 32) * 32)
            assert call["logsumexp"].is_contiguous() and call["bias_requires_grad"] is False
        else:
            assert call["compute_log_sumexp"] is True


@pytest.mark.parametrize("is_causal", [True, False])
def test_torchs_operator_and_the_kernel_below_agree_on_the_layout_of_sums(is_causal: bool) -> None:
    """[H, q] without gaps, and not [segments, H, longest], as earlier versions had."""
    with FakeTensorMode(), Recorded() as recorded:
        query, key, value = (
            torch.empty(rows, HEADS, QUERY, dtype=torch.bfloat16, device=CUDA) for rows in (60, 90, 90)
        )
        bounds = torch.empty(2, 4, dtype=torch.int32, device=CUDA)
        arguments = query, key, value, *bounds, 30, 50, is_causal, 0.1, [-1, 0 if is_causal else -1]
        output, sums, _ = varlen._varlen_attn._init_fn(*arguments)
        seed = torch.zeros(2, dtype=torch.uint64, device=CUDA)
        varlen._varlen_attn_backward._init_fn(
            query, query, key, value, output, sums, *bounds, 30, 50, is_causal, seed, 0.1, arguments[-1]
        )
        shape = torch.ops.torch_attn._varlen_attn(*arguments)[1].shape
    assert sums.shape == shape == (HEADS, 60)
    below = [call for name, call in recorded.calls if name.startswith("aten._flash_attention")]
    assert len(below) == 2
    for call in below:
        assert (call["max_q"], call["max_k"], call["dropout_p"]) == (30, 50, 0.0)
        assert call["is_causal"] is is_causal and call["scale"] == 0.1
        assert (call["window_size_left"], call["window_size_right"]) == (-1, 0 if is_causal else -1)
        of_bounds: list[Tensor] = [call["cum_seq_q"], call["cum_seq_k"]]
        assert all(each.shape == (4,) for each in of_bounds)
