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

from k25_train.data.batch import MicroBatch
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
    """[T] int64."""
    labels: Tensor
    """[T] int64."""
    targets: Targets
    """[T] each: which labels count, and as which kind of token."""
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


def to_device(number: int, batch: MicroBatch, media_pad: int, device: torch.device) -> DeviceBatch:
    """Move the micro-batch with this number to `device`; `media_pad` is the id of the vision placeholder."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    # The kind is an index into `next_token.KINDS`: text 0, caption 1.
    return DeviceBatch(
        number=number,
        tokens=move(batch.tokens),
        labels=move(batch.labels),
        targets=Targets(loss_mask=move(batch.loss_mask), kind=move(batch.is_caption.long())),
        document_lengths=batch.document_lengths,
        padding=batch.padding,
        media_positions=move((batch.tokens == media_pad).nonzero().squeeze(1)),
        pixels=None if batch.pixels is None else move(batch.pixels),
        grid_thw=batch.grid_thw,
    )


class TokenCounts(NamedTuple):
    """Tokens of the global batch."""

    with_loss: int
    """Tokens that count in the loss."""
    total: int
    """All tokens; padding is none."""


def count_tokens(batches: Sequence[DeviceBatch], topology: Topology) -> TokenCounts:
    """Count the global batch's tokens; every rank gets the same."""
    counted = [batch.targets.loss_mask.sum(dtype=torch.float64) for batch in batches]
    num_tokens = sum(
        length
        for batch in batches
        for position, length in enumerate(batch.document_lengths)
        if position not in batch.padding
    )
    # float64 counts exactly what a global batch of 67M tokens can have, and is reduced in one collective.
    counts = torch.stack([torch.stack(counted).sum(), torch.tensor(float(num_tokens)).to(counted[0])])
    dist.all_reduce(counts, group=topology.groups.dp)
    with_loss, everything = counts.tolist()
    return TokenCounts(int(with_loss), int(everything))


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
