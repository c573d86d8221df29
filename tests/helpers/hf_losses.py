"""Losses of the batches that `k25-eval dump=DIR` writes, computed by transformers from an exported folder.

Nothing of ours is between the files and the losses but the order of tokens and patches: transformers reads
config.json and the weights by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from tests.helpers.hf_reference import hf_logits

TOLERANCE = 1e-4
"""Largest difference of a token's loss, in nats."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """One dumped batch, as k25-eval and transformers see it; only tokens whose loss counts."""

    ours: Tensor
    """[N] nats."""
    theirs: Tensor
    """[N] nats."""
    has_media: Tensor
    """[N] whether the token's document has an image or a video chunk."""

    @property
    def largest(self) -> float:
        """The largest difference of a token's loss, in nats."""
        return (self.ours - self.theirs).abs().max().item()

    @property
    def of_mean(self) -> float:
        """The difference of the mean losses, in nats."""
        return (self.ours.double().mean() - self.theirs.double().mean()).abs().item()

    def of_documents(self, *, with_media: bool) -> Agreement:
        """That of the documents with media, or of those without."""
        chosen = self.has_media == with_media
        return Agreement(self.ours[chosen], self.theirs[chosen], self.has_media[chosen])


def join(batches: Iterable[Agreement]) -> Agreement:
    """All batches as one."""
    parts = [(batch.ours, batch.theirs, batch.has_media) for batch in batches]
    return Agreement(*(torch.cat(column) for column in zip(*parts, strict=True)))


def load_exported(folder: Path) -> torch.nn.Module:
    """The exported model in float32, as transformers loads it; AssertionError if it does so incompletely."""
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = {key: value for key, value in info.items() if value}
    assert not problems, f"transformers did not load {folder} cleanly: {problems}"
    return model.eval()


@torch.no_grad()
def losses_of_batch(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Loss of every token [T] in nats; each document of the packed batch is run alone."""
    grids = [(t, h, w) for t, h, w in batch["grid_thw"].tolist()]
    placeholders = (batch["tokens"] == model.config.image_token_id).nonzero().squeeze(1)
    assert torch.equal(placeholders, batch["media_positions"]), "a placeholder is no place of a vision token"
    logits = hf_logits(model, batch["tokens"], batch["document_lengths"].tolist(), batch.get("pixels"), grids)
    return functional.cross_entropy(logits, batch["labels"], reduction="none")


def compare_losses(exported: Path, dump: Path) -> Iterator[tuple[str, Agreement]]:
    """Name of every dumped batch, and how far transformers' losses are from those in it."""
    model = load_exported(exported)
    for path in sorted(dump.glob("batch_*.safetensors")):
        batch = load_file(path)
        counts = batch["loss_mask"] > 0
        theirs = losses_of_batch(model, batch)
        yield path.stem, Agreement(batch["losses"][counts], theirs[counts], has_media(batch)[counts])


def has_media(batch: dict[str, Tensor]) -> Tensor:
    """[T] whether a token's document has media."""
    is_media = torch.zeros_like(batch["tokens"], dtype=torch.bool)
    is_media[batch["media_positions"]] = True
    documents = is_media.split(batch["document_lengths"].tolist())
    return torch.cat([document.any().expand(len(document)) for document in documents])
