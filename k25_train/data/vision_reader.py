"""Work of the decoupled encoder in a step: the plan for all items of the global batch, one rank's pixels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from k25_train.data.decode.items import PlannedMedia
from k25_train.data.decode.media import MediaPatches, MediaReader
from k25_train.data.formats.records import MediaSegment, SampleRecord
from k25_train.data.mix.plan import SequencePlan, StepPlan, media_of
from k25_train.plan.vision_planner import VisionPlanner
from parallel.dep.engine import VisionWork
from parallel.dep.grid import Grid
from parallel.dep.plan import Part, VisionItem, VisionPlan, transfers_of
from parallel.dep.vision_pass import Chunk


class SampleItem(NamedTuple):
    """A vision item of the global batch in its sample."""

    record: SampleRecord
    media: PlannedMedia
    position: int
    """Position of the item among those of its image or video."""

    @property
    def grid_thw(self) -> Grid:
        """Patches of the item."""
        return self.media.items[self.position].grid_thw


@dataclass(frozen=True, slots=True)
class StepVision:
    """The global batch's items, and what this rank has read of them."""

    work: VisionWork
    """What the encoder does: the plan of all ranks, and this rank's pixels."""
    order: Sequence[Sequence[int]]
    """[replica] -> its micro-batches, numbered as in the global batch, in the order in which they run. Plan
    and work number them by their position in this order."""
    items: tuple[SampleItem, ...]
    """[item of the plan] -> its sample and file."""
    failures: dict[int, str]
    """Item of the plan -> why it did not decode, for the items of which this rank encodes at least a part.
    Their pixels are 0."""


class VisionReader:
    """Plans the items of a global batch and decodes those of one rank."""

    def __init__(
        self,
        media: MediaReader,
        planner: VisionPlanner,
        *,
        micro_batch_size: int,
        rank: int,
        num_replicas: int,
        pin_memory: bool,
    ) -> None:
        """With `pin_memory` pixels are in page-locked memory, which a GPU copies from while it computes."""
        self._media = media
        self._planner = planner
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._num_replicas = num_replicas
        self._pin_memory = pin_memory

    def read(self, batch: StepPlan) -> StepVision:
        """Plan the items of a global batch, the same on every rank, and decode this rank's."""
        # 1. Items of each micro-batch of the global batch.
        sequences, size = batch.sequences, self._micro_batch_size
        micro_batches = [
            list(_items_of(sequences[start : start + size])) for start in range(0, len(sequences), size)
        ]

        # 2. The order of each replica's micro-batches; items are numbered in that order.
        share = len(micro_batches) // self._num_replicas
        orders: list[Sequence[int]] = []
        items: list[SampleItem] = []
        planned: list[VisionItem] = []
        for replica in range(self._num_replicas):
            own = micro_batches[replica * share : (replica + 1) * share]
            orders.append(self._planner.order([[item.grid_thw for item in each] for each in own]))
            for turn, number in enumerate(orders[-1]):
                items += own[number]
                planned += [VisionItem(item.grid_thw, replica, turn) for item in own[number]]

        # 3. Who encodes what; this rank's share of it is decoded.
        plan, program = self._planner.plan(planned)
        failures: dict[int, str] = {}
        chunks = self._read_chunks(plan, items, failures)
        own_replica = self._rank if self._rank < self._num_replicas else None
        work = VisionWork(plan, chunks, transfers_of(plan, share, self._rank, own_replica), program)
        return StepVision(work, orders, tuple(items), failures)

    def _read_chunks(
        self, plan: VisionPlan, items: Sequence[SampleItem], failures: dict[int, str]
    ) -> list[Chunk]:
        """This rank's chunks; notes in `failures` which of its items did not decode."""
        own = plan.chunks[self._rank]
        wanted: dict[MediaSegment, set[int]] = {}
        for item in (items[plan.parts[number].item] for numbers in own for number in numbers):
            wanted.setdefault(item.media.segment, set()).add(item.position)
        decoded: dict[MediaSegment, MediaPatches] = {}
        chunks = []
        for numbers in own:
            parts = [plan.parts[number] for number in numbers]
            grids = tuple(plan.items[part.item].grid_thw for part in parts)
            pixels = []
            for part, grid in zip(parts, grids, strict=True):
                media, position = items[part.item].media, items[part.item].position
                # A video is decoded once, however many of its items are this rank's.
                if media.segment not in decoded:
                    decoded[media.segment] = self._media.load(media, wanted[media.segment])
                patches = decoded[media.segment]
                if patches.failure:
                    failures[part.item] = patches.failure
                pixels.append(_rows_of(part, grid, patches.items[position]))
            joined = torch.cat(pixels)
            chunks.append(Chunk(joined.pin_memory() if self._pin_memory else joined, grids))
        return chunks


def _items_of(sequences: Sequence[SequencePlan]) -> Iterator[SampleItem]:
    """Items of a micro-batch in the order of their placeholders."""
    for record, media in media_of(sequences):
        for position in range(len(media.items)):
            yield SampleItem(record, media, position)


def _rows_of(part: Part, grid_thw: Grid, pixels: Tensor) -> Tensor:
    """Of an item's patches [t*h*w, 3*p*p] those of a part's rows, frame after frame."""
    rows = slice(part.row, part.row + part.num_rows)
    return pixels.unflatten(0, grid_thw)[:, rows].flatten(0, 2)
