"""Next-token prediction: the mean negative log-likelihood of the tokens that count, reported by kind.

Shapes: T tokens of a micro-batch.
"""

import torch
from torch import Tensor

from k25_train.objectives.base import NamedSums, ObjectiveOutput, Targets

KINDS = ("text", "caption")
"""Kinds of tokens in pre-training: of text alone, and of samples with media. `Targets.kind` indexes them."""


class NextToken:
    """Sums the losses of tokens that count. Reports `KIND_loss`, in nats, and `KIND_tokens` of each kind."""

    def __init__(self, kinds: tuple[str, ...] = KINDS) -> None:
        self.kinds = kinds

    @property
    def sum_names(self) -> tuple[str, ...]:
        """Loss and number of tokens of each kind."""
        return tuple(f"{kind}_{what}" for kind in self.kinds for what in ("loss", "tokens"))

    def __call__(self, token_losses: Tensor, targets: Targets) -> ObjectiveOutput:
        """Sum the losses [T], or [1, T], of the tokens that count."""
        counted = token_losses.float().flatten() * targets.loss_mask
        num_tokens = targets.loss_mask.sum().to(torch.int)
        return ObjectiveOutput(counted.sum(), num_tokens, self._sums(counted.detach(), targets))

    def _sums(self, losses: Tensor, targets: Targets) -> Tensor:
        """Sums of the masked `losses` [T] and of the mask, by kind; the first kind gets the remainder."""
        losses, mask = losses.double(), targets.loss_mask.double()
        rest_loss, rest_tokens = losses.sum(), mask.sum()
        others = []
        for kind in range(1, len(self.kinds)):
            is_kind = (targets.kind == kind).double()
            loss, tokens = (losses * is_kind).sum(), (mask * is_kind).sum()
            rest_loss, rest_tokens = rest_loss - loss, rest_tokens - tokens
            others += [loss, tokens]
        return torch.stack([rest_loss, rest_tokens, *others])

    def loss(self, sums: NamedSums) -> float:
        """Mean loss per token over all kinds, in nats; 0 without tokens."""
        loss = sum(sums[f"{kind}_loss"] for kind in self.kinds)
        return loss / max(sum(sums[f"{kind}_tokens"] for kind in self.kinds), 1)

    def figures(self, sums: NamedSums) -> dict[str, float]:
        """`KIND_loss`, the mean per token in nats, of the kinds that have tokens."""
        tokens = {kind: sums[f"{kind}_tokens"] for kind in self.kinds}
        return {f"{kind}_loss": sums[f"{kind}_loss"] / count for kind, count in tokens.items() if count > 0}
