"""One micro-batch through one chunk of the model, and what the objective makes of its losses.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.

Shapes: T tokens of a micro-batch, V vision tokens, P patches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from k25_train.data.step_batches import Documents, StepBatches
from k25_train.model.attention import PackedDocuments
from k25_train.objectives.base import NamedSums, Objective, Targets, total
from k25_train.training.activations import Activations
from parallel.megatron.schedule import ForwardOutput
from parallel.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBatch:
    """A micro-batch where the model is."""

    number: int
    """Position of the micro-batch in its replica's step."""
    tokens: Tensor
    """[T] int64; [0] where no chunk embeds them."""
    labels: Tensor
    """[T] int64; [0] where no chunk has losses."""
    targets: Targets
    """[T] each: which labels count, and as which kind of token; [0] as the labels."""
    document_lengths: tuple[int, ...]
    """Tokens of each document; they sum to T."""
    padding: tuple[int, ...]
    """Positions in `document_lengths` of what is padding."""
    media_positions: Tensor
    """[V] int64, where the vision placeholders are."""
    pixels: Tensor | None
    """[P, 588] float32; None where the tower takes no pixels from micro-batches."""
    grid_thw: tuple[tuple[int, int, int], ...]
    """Patch grid of each item in placeholder order."""


def to_device(batches: StepBatches, device: torch.device) -> list[DeviceBatch]:
    """The micro-batches of a step on `device`: one copy of each kind of tensor, however many they are."""
    # 1. Small types cross the bus; the model takes those of torch's operators. The kind is an index into
    #    `next_token.KINDS`: text 0, caption 1.
    moved = [tensor.to(device, non_blocking=True) for tensor in batches.tensors()]
    tokens, labels, loss_mask, is_caption, media_positions, pixels = moved
    masks, kinds = loss_mask.float().unbind(), is_caption.long().unbind()
    all_tokens, all_labels = tokens.long().unbind(), labels.long().unbind()

    # 2. A view of each for every micro-batch.
    positions = media_positions.long().split(batches.num_media_positions)
    own_pixels: Sequence[Tensor | None] = [None] * len(batches.documents)
    if batches.has_pixels:
        own_pixels = pixels.split([_num_patches(each) for each in batches.documents])
    return [
        DeviceBatch(
            number=number,
            tokens=all_tokens[number],
            labels=all_labels[number],
            targets=Targets(loss_mask=masks[number], kind=kinds[number]),
            document_lengths=documents.lengths,
            padding=documents.padding,
            media_positions=positions[number],
            pixels=own_pixels[number],
            grid_thw=documents.grid_thw,
        )
        for number, documents in enumerate(batches.documents)
    ]


def _num_patches(documents: Documents) -> int:
    return sum(grid.num_patches for grid in documents.grid_thw)


class TokenCounts(NamedTuple):
    """Tokens of the global batch."""

    with_loss: int
    """Tokens that count in the loss."""
    total: int
    """All tokens; padding is none."""


def forward_micro_batch(
    batch: DeviceBatch,
    chunk: torch.nn.Module,
    as_schedule_plan: bool,
    *,
    objective: Objective,
    leaf: Callable[[int], Tensor | None],
    activations: Activations,
) -> ForwardOutput:
    """Run one chunk; the last one yields losses and how to sum them.

    Args:
        as_schedule_plan: the chunk does not run, but returns megatron-core's plan of its pass, which the
            overlapped schedule runs.
        objective: scores the losses of the last chunk.
        leaf: from a micro-batch's number to the features [V, D] that a decoupled tower has encoded for it.
        activations: saves what the backward pass needs.
    """
    # 1. What runs: the chunk, or megatron-core's plan of its pass.
    model: Any = getattr(chunk, "module", chunk)
    run = cast(Callable[..., Any], chunk.build_schedule_plan if as_schedule_plan else chunk)
    # 2. Only the first chunk embeds tokens, and so takes features.
    inputs = {
        "tokens": batch.tokens,
        "documents": PackedDocuments.of(batch.document_lengths, batch.tokens.device, batch.padding),
        "labels": batch.labels,
        "media_positions": batch.media_positions,
        "pixels": batch.pixels,
        "grid_thw": batch.grid_thw,
        "features": leaf(batch.number) if model.pre_process else None,
    }
    # 3. Run it, with what it saves for the backward pass stored by policy.
    forward = activations.forward_plan if as_schedule_plan else activations.forward
    output = forward(partial(run, **inputs), model, batch.number)
    return output, partial(objective, targets=batch.targets)


def sum_over_all_ranks(reported: Sequence[Tensor], objective: Objective, topology: Topology) -> NamedSums:
    """Add up what the last stages report of their micro-batches; every rank gets the total."""
    sums = total(reported, len(objective.sum_names), topology.device)
    dist.all_reduce(sums)
    return NamedSums.of(objective.sum_names, sums)
