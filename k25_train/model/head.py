"""The output head and the loss, a piece of the tokens at a time, with logits that are made again.

Logits of K2.5's vocabulary take 320 KB a token in bfloat16: 2.7 GB of 8,192 tokens, and as much again for
their gradient. Here they never exist as a whole:

    forward    features ─► head ─► logits of a piece ─► losses               features and labels are saved
    backward   features ─► head ─► logits of a piece ─► their gradient, in place ─┬─► gradient of the features
                                                                                  └─► added to main_grad

Losses and the features' gradient are those of whole logits, bitwise where a product's rows do not depend on
how many there are; the weight's gradient is added up piece by piece, in float32. Where no gradient is wanted,
as in an evaluation, losses are always made this way.

Shapes: T tokens, D hidden size, V words of the vocabulary.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from k25_train.model.token_losses import write_gradient, write_losses
from k25_train.plan.head_pieces import rows_of_head
from parallel.activations.annotate import makes_again
from parallel.megatron.weight_gradient import LinearGradient, SumOfGradients
from parallel.megatron.wgrad import WeightGradients, weight_gradients_of


def goes_by_pieces() -> bool:
    """Whether this pass makes losses by pieces: its policy says so, or it has no backward pass."""
    return not torch.is_grad_enabled() or makes_again("head.logits")


def add_losses_by_pieces(output_layer: Any) -> None:
    """Let a linear layer that gives logits take `labels`, with which it gives losses by pieces.

    Called through the module, so that data parallelism's hooks find its weights gathered.
    """
    wgrads = weight_gradients_of(output_layer)
    output_layer.forward = partial(_forward, output_layer.forward, output_layer.weight, wgrads)


def losses_by_pieces(
    features_TD: Tensor, weight_VD: nn.Parameter, labels_T: Tensor, wgrads: WeightGradients
) -> Tensor:
    """Cross entropies [T] float32 of features [T, D] against labels [T] int64; 0 where the label is -100.

    The weight's gradient goes to `wgrads`, from the backward pass: a head's is not computed later.
    """
    return _LossesByPieces.apply(features_TD, weight_VD, labels_T, wgrads)


def _forward(
    logits_of: Callable[..., Any],
    weight_VD: nn.Parameter,
    wgrads: WeightGradients,
    input_: Tensor,
    *arguments: Any,
    labels: Tensor | None = None,
    **more: Any,
) -> Any:
    if labels is None:
        return logits_of(input_, *arguments, **more)
    return losses_by_pieces(input_, weight_VD, labels, wgrads)


class _LossesByPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features_TD: Tensor, weight_VD: nn.Parameter, labels_T: Tensor, wgrads: WeightGradients
    ) -> Tensor:
        ctx.save_for_backward(features_TD, weight_VD, labels_T)
        # Saved tensors come back without Python attributes, such as `main_grad`, where hooks pack them.
        ctx.weight, ctx.wgrads = weight_VD, wgrads
        losses_T = features_TD.new_empty(labels_T.shape, dtype=torch.float32)
        for rows, logits_tV in _logits(features_TD, weight_VD):
            write_losses(logits_tV, labels_T[rows], losses_T[rows])
        return losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        features_TD, weight_VD, labels_T = ctx.saved_tensors
        of_features = torch.empty_like(features_TD) if ctx.needs_input_grad[0] else None

        def gradients_of_weight() -> Iterator[LinearGradient]:
            for rows, logits_tV in _logits(features_TD, weight_VD):
                write_gradient(logits_tV, labels_T[rows], gradients[0][rows], logits_tV)
                if of_features is not None:
                    torch.mm(logits_tV, weight_VD, out=of_features[rows])
                yield LinearGradient(logits_tV, features_TD[rows])

        of_weight, pieces = None, gradients_of_weight()
        if ctx.needs_input_grad[1]:
            of_weight = ctx.wgrads.add_now(ctx.weight, SumOfGradients(pieces))
        else:
            # The head is frozen: only its input has a gradient.
            for _ in pieces:
                pass
        return of_features, of_weight, None, None


def _logits(features_TD: Tensor, weight_VD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of each piece, and their logits, in memory that the next piece's will take."""
    num_tokens, num_words = len(features_TD), len(weight_VD)
    size = rows_of_head(num_tokens, num_words, features_TD.element_size())
    memory = features_TD.new_empty(size, num_words)
    for start in range(0, num_tokens, max(size, 1)):
        rows = slice(start, min(start + size, num_tokens))
        logits_tV = memory[: rows.stop - rows.start]
        torch.mm(features_TD[rows], weight_VD.T, out=logits_tV)
        yield rows, logits_tV
