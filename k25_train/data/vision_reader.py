"""What the decoupled encoder has to do in a step: the plan of the global batch, and one rank's pixels."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from k25_train.config.model import VisionConfig
from k25_train.data.decode.items import plan_items
from k25_train.data.decode.media import MediaPatches, MediaReader
from k25_train.data.formats.records import MediaSegment, SampleRecord
from k25_train.data.mix.plan import SequencePlan, StepPlan, media_of
from k25_train.plan.vision_planner import VisionPlanner
from parallel.dep.engine import VisionWork
from parallel.dep.grid import Grid
from parallel.dep.plan import Part, VisionItem, VisionPlan, transfers_of
from parallel.dep.vision_pass import Chunk


class Place(NamedTuple):
    """Where an item of the global batch comes from."""

    record: SampleRecord
    segment: MediaSegment
    position: int
    """Of the item among the segment's."""


@dataclass(frozen=True, slots=True)
class StepVision:
    """The global batch's items, and what this rank has read of them."""

    work: VisionWork
    order: Sequence[Sequence[int]]
    """[replica] -> its micro-batches, as counted in the global batch, in the order in which they run; plan
    and work count them by their place in it."""
    places: tuple[Place, ...]
    """[item of the plan] -> where it comes from."""
    failures: dict[int, str]
    """Item of the plan -> why it did not decode; of the items of which this rank encodes at least a part.
    Their pixels are 0."""


class VisionReader:
    """Plans the items of a global batch and decodes those of one rank."""

    def __init__(
        self,
        media: MediaReader,
        vision: VisionConfig,
        planner: VisionPlanner,
        *,
        micro_batch_size: int,
        rank: int,
        num_replicas: int,
        pin_memory: bool,
    ) -> None:
        """With `pin_memory` pixels lie where a GPU can fetch them beside its work."""
        self._media = media
        self._vision = vision
        self._planner = planner
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._num_replicas = num_replicas
        self._pin_memory = pin_memory

    def read(self, batch: StepPlan) -> StepVision:
        """Plan the items of a global batch, the same on every rank, and decode this rank's."""
        sequences, size = batch.sequences, self._micro_batch_size
        micro_batches = [
            list(self._items_of(sequences[start : start + size])) for start in range(0, len(sequences), size)
        ]
        share = len(micro_batches) // self._num_replicas
        orders: list[Sequence[int]] = []
        items: list[VisionItem] = []
        places: list[Place] = []
        for replica in range(self._num_replicas):
            own = micro_batches[replica * share : (replica + 1) * share]
            orders.append(self._planner.order([[grid for grid, _ in each] for each in own]))
            for turn, number in enumerate(orders[-1]):
                items += [VisionItem(grid, replica, turn) for grid, _ in own[number]]
                places += [place for _, place in own[number]]
        plan, program = self._planner.plan(items)
        failures: dict[int, str] = {}
        chunks = self._read_chunks(plan, places, failures)
        own_replica = self._rank if self._rank < self._num_replicas else None
        work = VisionWork(plan, chunks, transfers_of(plan, share, self._rank, own_replica), program)
        return StepVision(work, orders, tuple(places), failures)

    def _items_of(self, sequences: Sequence[SequencePlan]) -> Iterator[tuple[Grid, Place]]:
        """Items of a micro-batch in the order of their placeholders."""
        for record, segment in media_of(sequences):
            for position, item in enumerate(plan_items(segment, self._vision)):
                yield item.grid_thw, Place(record, segment, position)

    def _read_chunks(
        self, plan: VisionPlan, places: Sequence[Place], failures: dict[int, str]
    ) -> list[Chunk]:
        """This rank's chunks; notes in `failures` which of its items did not decode."""
        own = plan.chunks[self._rank]
        wanted: dict[MediaSegment, set[int]] = {}
        for place in (places[plan.parts[number].item] for numbers in own for number in numbers):
            wanted.setdefault(place.segment, set()).add(place.position)

        # A video is decoded once, however many of its items are this rank's.
        @functools.cache
        def load(segment: MediaSegment) -> MediaPatches:
            return self._media.load(segment, wanted[segment])

        chunks = []
        for numbers in own:
            parts = [plan.parts[number] for number in numbers]
            grids = tuple(plan.items[part.item].grid_thw for part in parts)
            pixels = []
            for part, grid in zip(parts, grids, strict=True):
                place = places[part.item]
                media = load(place.segment)
                if media.failure:
                    failures[part.item] = media.failure
                pixels.append(_rows_of(part, grid, media.items[place.position]))
            joined = torch.cat(pixels)
            chunks.append(Chunk(joined.pin_memory() if self._pin_memory else joined, grids))
        return chunks


def _rows_of(part: Part, grid_thw: tuple[int, int, int], pixels: Tensor) -> Tensor:
    """Of an item's patches [t*h*w, 3*p*p] those of a part's rows, frame after frame."""
    rows = slice(part.row, part.row + part.num_rows)
    return pixels.unflatten(0, grid_thw)[:, rows].flatten(0, 2)
