"""Micro-batches where the model is, or with context parallelism the tokens of them that a rank holds.

Shapes: T tokens that the rank holds of a micro-batch, V vision tokens, P patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from k25_train.data.context import ContextShare, HeldBatches, WholeShare
from k25_train.data.step_batches import Documents
from k25_train.objectives.base import PolicyTargets, Targets, no_policy


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBatch:
    """A micro-batch where the model is."""

    number: int
    """Position of the micro-batch in its replica's step."""
    tokens: Tensor
    """[T] int32, part of the step's; [0] where no chunk embeds them."""
    labels: Tensor
    """[T] int32, part of the step's; [0] where no chunk has losses."""
    targets: Targets
    """[T] each: which labels count, and the source of each token; [0] as the labels."""
    document_lengths: tuple[int, ...]
    """Tokens of each document of the micro-batch, those of other ranks included."""
    padding: tuple[int, ...]
    """Positions in `document_lengths` of what is padding."""
    share: ContextShare | WholeShare
    """Which tokens of it the rank holds."""
    media_positions: Tensor
    """[V] int64, where the vision placeholders are."""
    feature_rows: Tensor | None
    """[V] int64, the row of the features of `grid_thw` that each takes; None where it is all in order."""
    pixels: Tensor | None
    """[P, 588] uint8; None where the tower takes no pixels from micro-batches."""
    grid_thw: tuple[tuple[int, int, int], ...]
    """Patch grid of each item of which the rank holds a token, in placeholder order."""


def to_device(held: HeldBatches, device: torch.device) -> list[DeviceBatch]:
    """The micro-batches of a step on `device`: one copy of each kind of tensor, however many they are."""
    # 1. Small types cross the bus.
    batches = held.batches
    moved = [tensor.to(device, non_blocking=True) for tensor in held.tensors()]
    tokens, labels, loss_mask, source, policy, responses, media_positions, pixels, feature_rows = moved
    masks, sources = loss_mask.float().unbind(), source.long().unbind()
    all_tokens, all_labels = tokens.unbind(), labels.unbind()

    # 2. A view of each for every micro-batch.
    positions = media_positions.long().split(batches.num_media_positions)
    rows: Sequence[Tensor | None] = [None] * len(batches.documents)
    if held.is_shared:
        rows = feature_rows.long().split(batches.num_media_positions)
    policies = [no_policy(device)] * len(batches.documents)
    if policy.shape[1]:
        numbers = responses.long().unbind()
        policies = [
            PolicyTargets._make([*columns.unbind(), of])
            for columns, of in zip(policy.unbind(), numbers, strict=True)
        ]
    own_pixels: Sequence[Tensor | None] = [None] * len(batches.documents)
    if batches.has_pixels:
        own_pixels = pixels.split([_num_patches(each) for each in batches.documents])
    return [
        DeviceBatch(
            number=number,
            tokens=all_tokens[number],
            labels=all_labels[number],
            targets=Targets(loss_mask=masks[number], source=sources[number], policy=policies[number]),
            document_lengths=documents.lengths,
            padding=documents.padding,
            share=share,
            media_positions=positions[number],
            feature_rows=rows[number],
            pixels=own_pixels[number],
            grid_thw=documents.grid_thw,
        )
        for number, (documents, share) in enumerate(zip(batches.documents, held.shares, strict=True))
    ]


def _num_patches(documents: Documents) -> int:
    return sum(grid.num_patches for grid in documents.grid_thw)
