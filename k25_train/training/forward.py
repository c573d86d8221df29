"""One micro-batch through one chunk of the model, and what the objective makes of its losses.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.

Shapes: T tokens of a micro-batch, V vision tokens, P patches.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from k25_train.data.context import WholeShare
from k25_train.model.packed_documents import PackedDocuments
from k25_train.objectives.base import NamedSums, Objective, total
from k25_train.training.activations import Activations
from k25_train.training.device_batch import DeviceBatch
from parallel.megatron.schedule import ForwardOutput
from parallel.topology import Topology


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
        leaf: from a micro-batch's number to the features [V, D] that a decoupled tower has encoded for the
            placeholders of it that this rank holds.
        activations: saves what the backward pass needs.
    """
    # 1. What runs: the chunk, or megatron-core's plan of its pass.
    model: Any = getattr(chunk, "module", chunk)
    run = cast(Callable[..., Any], chunk.build_schedule_plan if as_schedule_plan else chunk)
    # 2. Only the first chunk embeds tokens, and so takes features. What is saved of token ids and labels, in
    #    the type of torch's operators, is this micro-batch's own.
    inputs = {
        "tokens": batch.tokens.long(),
        "documents": documents_of(batch),
        "labels": batch.labels.long(),
        "media_positions": batch.media_positions,
        "pixels": batch.pixels,
        "grid_thw": batch.grid_thw,
        "feature_rows": batch.feature_rows,
        "features": leaf(batch.number) if model.pre_process else None,
    }
    # 3. Run it, with what it saves for the backward pass stored by policy.
    forward = activations.forward_plan if as_schedule_plan else activations.forward
    output = forward(partial(run, **inputs), model, batch.number)
    return output, partial(objective, targets=batch.targets)


def documents_of(batch: DeviceBatch) -> PackedDocuments:
    """The documents of a micro-batch, or what the rank holds of them."""
    device, share = batch.tokens.device, batch.share
    if isinstance(share, WholeShare):
        return PackedDocuments.of(batch.document_lengths, device, batch.padding)
    return PackedDocuments.of_shard(share.plan, share.cp_rank, device)


def sum_over_all_ranks(reported: Sequence[Tensor], objective: Objective, topology: Topology) -> NamedSums:
    """Add up what the last stages report of their micro-batches; every rank gets the total."""
    sums = total(reported, len(objective.sum_names), topology.device)
    dist.all_reduce(sums)
    return NamedSums.of(objective.sum_names, sums)
