"""All micro-batches of a step on one rank, stacked: a tensor of each kind, however many there are.

A replica has up to thousands of micro-batches per step: moved one by one, their launches alone would keep the
device waiting between two steps.

Shapes: M micro-batches of T tokens, V vision tokens and P patches of all of them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from k25_train.data.batch import MicroBatch, mask_failed, mask_unreadable
from parallel.dep.grid import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatches:
    """The micro-batches of a replica, in the order in which they run. Tensors that this rank does not read
    have no columns."""

    tokens: Tensor
    """[M, T] int32."""
    labels: Tensor
    """[M, T] int32."""
    loss_mask: Tensor
    """[M, T] bool."""
    source: Tensor
    """[M, T] int16."""
    policy: Tensor
    """[M, C, T] float32; [M, 0, 0] in next-token prediction."""
    responses: Tensor
    """[M, T] int32; [M, 0] in next-token prediction."""
    media_positions: Tensor
    """[V] int32, within their micro-batch."""
    pixels: Tensor
    """[P, 3*p*p] uint8; no rows unless the rank encodes them."""
    has_pixels: bool
    """Whether it does."""
    num_media_positions: tuple[int, ...]
    """[micro-batch] -> its share of V."""
    documents: tuple["Documents", ...]
    """[micro-batch] -> what the index tells of it."""

    @property
    def num_with_loss(self) -> int:
        """Tokens that count in the loss."""
        return sum(sum(each.num_targets) for each in self.documents)

    @property
    def num_tokens(self) -> int:
        """All tokens but padding."""
        return sum(
            sum(each.lengths) - sum(each.lengths[position] for position in each.padding)
            for each in self.documents
        )

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order in which `with_tensors` takes them."""
        return [
            self.tokens, self.labels, self.loss_mask, self.source, self.policy, self.responses,
            self.media_positions, self.pixels,
        ]  # fmt: skip

    def with_tensors(self, tensors: Sequence[Tensor]) -> "StepBatches":
        """The same with its tensors elsewhere."""
        tokens, labels, loss_mask, source, policy, responses, media_positions, pixels = tensors
        return replace(
            self,
            tokens=tokens,
            labels=labels,
            loss_mask=loss_mask,
            source=source,
            policy=policy,
            responses=responses,
            media_positions=media_positions,
            pixels=pixels,
        )


class Documents(NamedTuple):
    """The documents and items of one micro-batch; fields are those of `MicroBatch`.

    A tuple, because a step has thousands, which pass between processes.
    """

    lengths: tuple[int, ...]
    padding: tuple[int, ...]
    num_targets: tuple[int, ...]
    unreadable: tuple[int, ...]
    grid_thw: tuple[Grid, ...]
    item_documents: tuple[int, ...]
    failed_items: tuple[int, ...]


def stack(batches: Sequence[MicroBatch]) -> StepBatches:
    """Stack the micro-batches of a step, of which there is at least one."""
    pixels = [batch.pixels for batch in batches if batch.pixels is not None]

    def rows(of: Callable[[MicroBatch], Tensor], dtype: torch.dtype) -> Tensor:
        # A copy with the smallest type that holds the values: all of this crosses the bus.
        return torch.stack([of(batch).to(dtype) for batch in batches])

    return StepBatches(
        tokens=rows(lambda batch: batch.tokens, torch.int32),
        labels=rows(lambda batch: batch.labels, torch.int32),
        loss_mask=rows(lambda batch: batch.loss_mask, torch.bool),
        source=rows(lambda batch: batch.source, torch.int16),
        policy=rows(lambda batch: batch.policy, torch.float32),
        responses=rows(lambda batch: batch.responses, torch.int32),
        media_positions=torch.cat([batch.media_positions for batch in batches]).to(torch.int32),
        pixels=_joined(pixels) if pixels else torch.zeros(0, 0, dtype=torch.uint8),
        has_pixels=bool(pixels),
        num_media_positions=tuple(len(batch.media_positions) for batch in batches),
        documents=tuple(map(_documents_of, batches)),
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors [P, D] of one type behind one another, without a copy where they already are in memory."""
    first = parts[0]
    ends = [part.data_ptr() + part.nbytes for part in parts[:-1]]
    follow = [part.data_ptr() for part in parts[1:]]
    storage = first.untyped_storage()
    is_one = all(part.untyped_storage().data_ptr() == storage.data_ptr() for part in parts)
    if not (is_one and ends == follow and all(part.is_contiguous() for part in parts)):
        return torch.cat(list(parts))
    return first.as_strided((sum(map(len, parts)), first.shape[1]), first.stride())


def without_failures(
    batches: StepBatches,
    failed_items: Mapping[int, Iterable[int]],
    unreadable: Mapping[int, Iterable[int]],
) -> StepBatches:
    """The micro-batches without the loss of what other ranks could not read; twice changes nothing.

    Args:
        failed_items: micro-batch -> items that did not decode.
        unreadable: micro-batch -> documents whose words cannot be used.
    """
    labels, loss_mask = batches.labels.clone(), batches.loss_mask.clone()
    documents = list(batches.documents)
    for number in sorted({*failed_items, *unreadable}):
        batch = _one_of(batches, number)
        batch = mask_unreadable(batch, sorted(unreadable.get(number, ())))
        batch = mask_failed(batch, sorted(failed_items.get(number, ())))
        labels[number], loss_mask[number] = batch.labels, batch.loss_mask.bool()
        documents[number] = _documents_of(batch)
    return replace(batches, labels=labels, loss_mask=loss_mask, documents=tuple(documents))


def _one_of(batches: StepBatches, number: int) -> MicroBatch:
    """A micro-batch with what a failure changes of it."""
    own = batches.documents[number]
    return MicroBatch(
        tokens=batches.tokens[number],
        labels=batches.labels[number],
        loss_mask=batches.loss_mask[number].float(),
        source=batches.source[number],
        policy=batches.policy[number],
        responses=batches.responses[number],
        media_positions=batches.media_positions[:0],
        document_lengths=own.lengths,
        padding=own.padding,
        num_targets=own.num_targets,
        unreadable=own.unreadable,
        grid_thw=own.grid_thw,
        item_documents=own.item_documents,
        pixels=None,
        failed_items=own.failed_items,
    )


def _documents_of(batch: MicroBatch) -> Documents:
    return Documents(
        lengths=batch.document_lengths,
        padding=batch.padding,
        num_targets=batch.num_targets,
        unreadable=batch.unreadable,
        grid_thw=batch.grid_thw,
        item_documents=batch.item_documents,
        failed_items=batch.failed_items,
    )
