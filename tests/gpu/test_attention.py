"""Attention's kernels on a GPU against the CPU: outputs, gradients and largest logits, without waiting."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from k25_train.model.attention_kernels import HeadSizes, build_attention
from k25_train.model.documents import DocumentBounds
from k25_train.model.moonvit_attention import attention_over
from k25_train.model.moonvit_items import Grid, pack_items
from k25_train.plan.memory.kernels import AttentionKernel

pytestmark = pytest.mark.gpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SCALE = 0.1
KIMI_K2_5, TINY = HeadSizes(4, 192, 128), HeadSizes(2, 24, 16)
BATCHES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((4096,), ()),
    ((1, 4095), ()),
    ((1,) * 40, ()),
    ((1000, 3, 300, 1, 700), (1, 4)),
    ((20, 44), (0, 1)),
]
"""Documents, and which of them are padding."""


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether they differ by what bfloat16 rounds."""
    difference = (found.cpu().float() - expected).norm()
    return bool(difference <= 1e-2 * expected.norm() + 1e-6)


@pytest.mark.parametrize("kernel", [AttentionKernel.varlen, AttentionKernel.transformer_engine])
@pytest.mark.parametrize("heads", [KIMI_K2_5, TINY], ids=["Kimi K2.5's heads", "tiny heads"])
@pytest.mark.parametrize(("lengths", "padding"), BATCHES)
def test_one_call_computes_what_the_cpu_does(
    kernel: AttentionKernel, heads: HeadSizes, lengths: tuple[int, ...], padding: tuple[int, ...]
) -> None:
    if kernel is AttentionKernel.transformer_engine:
        pytest.importorskip("transformer_engine")
    torch.manual_seed(0)
    tokens, widths = sum(lengths), (heads.query, heads.query, heads.value)
    # What bfloat16 can hold, so that both begin with the same numbers.
    values = [torch.randn(tokens, heads.num_heads, width).bfloat16() for width in widths]
    is_real = DocumentBounds.of(lengths, CPU, padding).first_keys < tokens
    found = []
    for device, which in ((CPU, AttentionKernel.cpu), (CUDA, kernel)):
        dtype = torch.float32 if which is AttentionKernel.cpu else torch.bfloat16
        inputs = [each.to(device, dtype).requires_grad_() for each in values]
        attention = build_attention(which, heads, SCALE, layer_number=1, max_document_tokens=tokens)
        documents = DocumentBounds.of(lengths, device, padding)
        attended, largest = attention.attend_and_measure(*inputs, documents)
        (attended * is_real.to(device)[:, None]).float().square().sum().backward()
        gradients = [each.grad for each in inputs if each.grad is not None]
        found.append((largest, [attended[is_real.to(device)], *gradients]))
    (expected_logits, expected), (logits, results) = found
    assert all(close(*pair) for pair in zip(results, [each.detach() for each in expected], strict=True))
    if expected_logits is None:
        assert logits is None or (logits == -torch.inf).all()
    else:
        # Transformer Engine rounds them to bfloat16.
        torch.testing.assert_close(logits.cpu(), expected_logits, rtol=8e-3, atol=1e-3)


def test_largest_logits_and_attention_never_wait_for_the_device() -> None:
    rows = [torch.randn(64, 4, 192, device=CUDA, dtype=torch.bfloat16) for _ in range(2)]
    value = torch.randn(64, 4, 128, device=CUDA, dtype=torch.bfloat16)
    attention = build_attention(
        AttentionKernel.varlen, KIMI_K2_5, SCALE, layer_number=1, max_document_tokens=64
    )
    # Kernels are loaded, and page-locked memory is allocated, at first use.
    attention.attend_and_measure(*rows, value, DocumentBounds.of((30, 34), CUDA))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lengths in ((64,), (1,) * 64, (20, 1, 43)):
            attention.attend_and_measure(*rows, value, DocumentBounds.of(lengths, CUDA))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "grids", [[(1, 4, 6)], [(1, 2, 2)] * 7, [(1, 64, 64), (4, 2, 6), (1, 2, 8)]], ids=str
)
def test_the_towers_call_computes_what_the_cpu_does(grids: Sequence[Grid]) -> None:
    torch.manual_seed(0)
    items = pack_items(grids)
    patches = sum(t * h * w for t, h, w in grids)
    values = [torch.randn(patches, 4, 72).bfloat16() for _ in range(3)]
    found = []
    for device, dtype, kernel in (
        (CPU, torch.float32, AttentionKernel.cpu),
        (CUDA, torch.bfloat16, AttentionKernel.varlen),
    ):
        inputs = [each.to(device, dtype).requires_grad_() for each in values]
        attended = attention_over(items, device, kernel)(*inputs)
        attended.float().square().sum().backward()
        found.append([attended.detach(), *(each.grad for each in inputs if each.grad is not None)])
    assert all(close(*pair) for pair in zip(found[1], found[0], strict=True))
