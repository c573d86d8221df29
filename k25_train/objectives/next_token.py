"""Next-token prediction: the mean negative log-likelihood of the tokens that count, reported by source.

Shapes: T tokens of a micro-batch, N sources.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from k25_train.objectives.base import NamedSums, ObjectiveOutput, Targets


class NextToken:
    """Sums the losses of tokens that count, by source. Figures are also the means over sources of text alone,
    `text_loss`, and over those with media, `caption_loss`."""

    def __init__(self, sources: Iterable[str], with_media: Collection[str]) -> None:
        """`sources`: names, which `Targets.source` indexes; `with_media` are those that have images or
        video."""
        self.sources = tuple(sources)
        self.groups = {
            "text_loss": [name for name in self.sources if name not in with_media],
            "caption_loss": [name for name in self.sources if name in with_media],
        }

    @property
    def sum_names(self) -> tuple[str, ...]:
        """Loss and number of tokens of each source."""
        return tuple(f"{what}/{source}" for source in self.sources for what in ("loss", "tokens"))

    def __call__(self, token_losses: Tensor, targets: Targets) -> ObjectiveOutput:
        """Sum the losses [T], or [1, T], of the tokens that count."""
        counted = token_losses.float().flatten() * targets.loss_mask
        num_tokens = targets.loss_mask.sum().to(torch.int)
        return ObjectiveOutput(counted.sum(), num_tokens, self._sums(counted.detach(), targets))

    def _sums(self, losses: Tensor, targets: Targets) -> Tensor:
        """Sums of the masked `losses` [T] and of the mask by source, [2 * N] float64."""
        numbers = torch.arange(len(self.sources), device=losses.device)
        # A product of matrices: as many kernels however many sources, and the same sums in every run, which
        # atomic additions would not give.
        is_of = (targets.source == numbers[:, None]).double()
        return (is_of @ torch.stack([losses, targets.loss_mask], dim=1).double()).flatten()

    def loss(self, sums: NamedSums) -> float:
        """Mean loss per token over all sources, in nats; 0 without tokens."""
        return _mean(sums, self.sources)

    def figures(self, sums: NamedSums) -> dict[str, float]:
        """The mean per token in nats of both groups and of each source, `loss/SOURCE`, where there are
        tokens."""
        of = {**self.groups, **{f"loss/{name}": [name] for name in self.sources}}
        return {name: _mean(sums, sources) for name, sources in of.items() if _num_tokens(sums, sources)}


def _num_tokens(sums: NamedSums, sources: Iterable[str]) -> float:
    return sum(sums[f"tokens/{source}"] for source in sources)


def _mean(sums: NamedSums, sources: Collection[str]) -> float:
    return sum(sums[f"loss/{source}"] for source in sources) / max(_num_tokens(sums, sources), 1)
