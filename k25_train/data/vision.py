"""What the decoupled encoder has to do in a step: the plan of the global batch, and one rank's pixels."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from k25_train.config.schema import VisionConfig
from k25_train.data.batch import SequencePlan, media_of
from k25_train.data.images import plan_items
from k25_train.data.index import MediaSegment, SampleRecord
from k25_train.data.media import MediaReader
from parallel.config import DepConfig
from parallel.dep.engine import VisionWork
from parallel.dep.plan import EncoderCost, Part, VisionItem, VisionPlan, plan_vision
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
        cost: EncoderCost,
        dep: DepConfig,
        *,
        micro_batch_size: int,
        rank: int,
        num_ranks: int,
        num_replicas: int,
    ) -> None:
        self._media = media
        self._vision = vision
        self._cost = cost
        self._dep = dep
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._num_ranks = num_ranks
        self._num_replicas = num_replicas

    def read(self, sequences: Sequence[SequencePlan]) -> StepVision:
        """Plan the items of these sequences, the same on every rank, and decode this rank's."""
        share = len(sequences) // self._num_replicas
        items: list[VisionItem] = []
        places: list[Place] = []
        for number, sequence in enumerate(sequences):
            replica, micro_batch = number // share, number % share // self._micro_batch_size
            for record, segment in media_of([sequence]):
                for position, item in enumerate(plan_items(segment, self._vision)):
                    items.append(VisionItem(item.grid_thw, replica, micro_batch))
                    places.append(Place(record, segment, position))
        plan = plan_vision(
            items,
            self._num_ranks,
            self._cost,
            max_patches_per_chunk=self._dep.max_patches_per_chunk,
            split=self._dep.split_items,
        )
        failures: dict[int, str] = {}
        chunks = self._read_chunks(plan, places, failures)
        work = VisionWork(plan, chunks, share // self._micro_batch_size)
        return StepVision(work, tuple(places), failures)

    def _read_chunks(
        self, plan: VisionPlan, places: Sequence[Place], failures: dict[int, str]
    ) -> list[Chunk]:
        """This rank's chunks; notes in `failures` which of its items did not decode."""
        # A video is decoded once, however many of its items are this rank's.
        load = functools.cache(self._media.load)
        chunks = []
        for numbers in plan.chunks[self._rank]:
            parts = [plan.parts[number] for number in numbers]
            grids = tuple(plan.items[part.item].grid_thw for part in parts)
            pixels = []
            for part, grid in zip(parts, grids, strict=True):
                place = places[part.item]
                media = load(place.segment)
                if media.failure:
                    failures[part.item] = media.failure
                pixels.append(_rows_of(part, grid, media.items[place.position]))
            chunks.append(Chunk(torch.cat(pixels), grids))
        return chunks


def _rows_of(part: Part, grid_thw: tuple[int, int, int], pixels: Tensor) -> Tensor:
    """Of an item's patches [t*h*w, 3*p*p] those of a part's rows, frame after frame."""
    rows = slice(part.row, part.row + part.num_rows)
    return pixels.unflatten(0, grid_thw)[:, rows].flatten(0, 2)
