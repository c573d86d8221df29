"""Losses of tokens are bitwise those of torch's cross entropy, and take a fraction of its memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from k25_train.model import token_losses as module
from k25_train.model.token_losses import token_losses

NUM_TOKENS, NUM_WORDS = 70, 1000


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels of which some are missing, and a gradient that differs from token to token."""
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(NUM_TOKENS, NUM_WORDS, generator=generator)
    labels = torch.randint(NUM_WORDS, (NUM_TOKENS,), generator=generator)
    labels[::7] = -100
    return logits.to(dtype), labels, torch.randn(NUM_TOKENS, generator=generator)


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none")


@pytest.mark.parametrize("rows", [1, 3, 64, 1000], ids=lambda rows: f"{rows} rows at a time")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_as_cross_entropy(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int) -> None:
    monkeypatch.setattr(module, "LOSS_PIECE_BYTES", rows * NUM_WORDS * 4)
    logits, labels, weights = case(dtype)
    found = []
    for losses_of in (plain, token_losses):
        leaf = logits.clone().requires_grad_()
        losses = losses_of(leaf, labels)
        losses.backward(weights)
        assert leaf.grad is not None
        found.append((losses, leaf.grad))
    for expected, own in zip(*found, strict=True):
        assert own.dtype == expected.dtype and torch.equal(own, expected)


class LargestResult(TorchDispatchMode):
    """The most bytes in float32 that an operation returns."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype is torch.float32:
            self.most = max(self.most, result.nbytes)
        return result


def test_nothing_of_the_size_of_float32_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    piece = 8 * NUM_WORDS * 4
    monkeypatch.setattr(module, "LOSS_PIECE_BYTES", piece)
    logits, labels, weights = case(torch.bfloat16)
    for losses_of, least, most in (
        (plain, 4 * logits.numel(), 4 * logits.numel()),
        (token_losses, piece, piece),
    ):
        leaf = logits.clone().requires_grad_()
        with LargestResult() as seen:
            losses_of(leaf, labels).backward(weights)
        assert least <= seen.most <= most
