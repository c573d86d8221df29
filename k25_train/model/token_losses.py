"""The loss of each token, with its gradient computed in place of a copy of the logits.

For a vocabulary of 163,840, float32 logits of 4,096 tokens take 2.7 GB. `F.cross_entropy` keeps them
normalised, and holds three of that size in its backward pass: them, the gradient by them, and that by the
logits. Here only the logits in their own format are kept, and everything in float32 is made for a few rows at
a time. Each row goes through the same kernels, so losses and gradients are bitwise those of
`F.cross_entropy`.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from k25_train.config.model import LOSS_PIECE_BYTES

NO_LABEL = -100
"""Label of a token without a loss, as `F.cross_entropy` has it."""


def token_losses(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Cross entropies [T] float32 of logits [T, V] against labels [T] int64; 0 where the label is -100."""
    return _TokenLosses.apply(logits_TV, labels_T)


def write_losses(logits_TV: Tensor, labels_T: Tensor, losses_T: Tensor) -> None:
    """Write what `token_losses` returns to `losses_T`, float32, without a graph."""
    for rows in _pieces(logits_TV):
        losses_T[rows] = F.nll_loss(_normalised(logits_TV[rows]), labels_T[rows], reduction="none")


def write_gradient(logits_TV: Tensor, labels_T: Tensor, by_loss_T: Tensor, by_logits_TV: Tensor) -> None:
    """Write the gradient of the logits to `by_logits_TV`, which may be the logits themselves.

    Args:
        logits_TV: logits, [T, V].
        labels_T: labels, [T] int64.
        by_loss_T: gradient of each token's loss, [T] float32.
        by_logits_TV: where it goes, [T, V].
    """
    for rows in _pieces(logits_TV):
        scores = _normalised(logits_TV[rows])
        by_scores = torch.ops.aten.nll_loss_backward(
            by_loss_T[rows], scores, labels_T[rows], None, 0, NO_LABEL, scores.new_zeros(())
        )
        by_logits_TV[rows] = torch.ops.aten._log_softmax_backward_data(by_scores, scores, 1, scores.dtype)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor) -> Tensor:
        ctx.save_for_backward(logits_TV, labels_T)
        losses_T = logits_TV.new_empty(labels_T.shape, dtype=torch.float32)
        write_losses(logits_TV, labels_T, losses_T)
        return losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits_TV, labels_T = ctx.saved_tensors
        by_logits_TV = torch.empty_like(logits_TV)
        write_gradient(logits_TV, labels_T, gradients[0], by_logits_TV)
        return by_logits_TV, None


def _normalised(logits_TV: Tensor) -> Tensor:
    return logits_TV.float().log_softmax(dim=1)


def _pieces(logits_TV: Tensor) -> Iterator[slice]:
    """Slices of rows that take `LOSS_PIECE_BYTES` in float32, or a row each."""
    num_tokens, num_words = logits_TV.shape
    size = max(LOSS_PIECE_BYTES // (4 * num_words), 1)
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))
