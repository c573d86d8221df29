"""Work of the decoupled encoder in a step: one rank's share of the plan for all items, and its pixels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from k25_train.config.vision import VisionConfig
from k25_train.data.decode.items import PlannedMedia
from k25_train.data.decode.media import MediaPatches
from k25_train.data.formats.records import MediaSegment
from k25_train.data.mix.plan import SampleItem, StepPlan
from k25_train.data.placeholders import runs_in
from k25_train.data.readable_source import ReadableSource
from k25_train.data.units import MediaUnit, UnitReading
from k25_train.plan.vision_planner import VisionPlanner
from parallel.dep.engine import VisionWork
from parallel.dep.grid import Grid
from parallel.dep.plan import Part, VisionItem
from parallel.dep.plan_share import NO_SHARE, PlanShare
from parallel.dep.transfers import Receiver
from parallel.dep.vision_pass import Chunk


class FailedItem(NamedTuple):
    """An item whose file did not decode."""

    replica: int
    """Replica that owns its sample."""
    micro_batch: int
    """Number of its micro-batch, in the order in which the replica takes them."""
    item: int
    """Its position among the items of its micro-batch."""
    sample: str
    """Where its sample is, as messages say it."""
    reason: str
    """Why it did not decode."""


@dataclass(frozen=True, slots=True)
class StepVision:
    """What a rank's encoder does in a step, with the pixels that it has read."""

    work: VisionWork
    """The rank's share of the plan, and its pixels."""
    order: Sequence[int]
    """The own replica's micro-batches, numbered as in the batch, in the order in which they run. Work numbers
    them by their position in this order."""
    failures: tuple[FailedItem, ...]
    """Items that did not decode, of those of which this rank encodes at least a part. Their pixels
    are black."""


class VisionSource(Protocol):
    """Plans and reads the vision items of a step: `VisionReader` or, its do-nothing twin, `NoVision`."""

    def read(self, batch: StepPlan) -> StepVision:
        """What this rank encodes of a global batch."""


class NoVision:
    """With a coupled tower nothing is encoded around the pipeline, and micro-batches run as they come."""

    def __init__(self, sequences_per_turn: int) -> None:
        """`sequences_per_turn`: those of one micro-batch of each replica."""
        self._sequences_per_turn = sequences_per_turn

    def read(self, batch: StepPlan) -> StepVision:
        """Nothing."""
        num_micro_batches = batch.num_sequences // self._sequences_per_turn
        return StepVision(VisionWork(NO_SHARE, (), ()), range(num_micro_batches), ())


class VisionReader:
    """Plans the items of a global batch and decodes those of one rank."""

    def __init__(
        self,
        reading: UnitReading,
        sources: Mapping[str, ReadableSource],
        planner: VisionPlanner,
        *,
        vision: VisionConfig,
        micro_batch_size: int,
        seq_len: int,
        rank: int,
        replica: int,
        num_replicas: int,
        cp: int,
    ) -> None:
        """`replica`: the one whose pipeline the rank belongs to, whichever stage it is; `cp`: ranks that each
        of its stages has."""
        self._reading = reading
        self._sources = sources
        self._planner = planner
        self._patch_values = 3 * vision.patch_size**2
        self._micro_batch_size = micro_batch_size
        self._seq_len = seq_len
        self._rank = rank
        self._replica = replica
        self._num_replicas = num_replicas
        self._cp = cp

    def read(self, batch: StepPlan) -> StepVision:
        """Plan the items of a global batch, the same on every rank, and decode this rank's."""
        # 1. Items of each micro-batch of the global batch.
        grids = batch.grids()
        firsts = batch.first_items()[:: self._micro_batch_size].tolist()
        micro_batches = [range(first, end) for first, end in pairwise(firsts)]

        # 2. The order of each replica's micro-batches; items are numbered in that order.
        share = len(micro_batches) // self._num_replicas
        orders: list[Sequence[int]] = []
        numbers: list[int] = []
        planned: list[VisionItem] = []
        for replica in range(self._num_replicas):
            own = micro_batches[replica * share : (replica + 1) * share]
            orders.append(self._planner.order([grids[each.start : each.stop] for each in own]))
            for turn, number in enumerate(orders[-1]):
                numbers += own[number]
                planned += [VisionItem(grids[item], replica, turn) for item in own[number]]

        # 3. Who encodes what, and who receives it; this rank's share of it is decoded.
        runs = runs_in(
            batch,
            orders,
            self._sources,
            micro_batch_size=self._micro_batch_size,
            seq_len=self._seq_len,
            cp=self._cp,
        )
        first_of = self._replica if self._rank < self._num_replicas * self._cp else None
        shared, program = self._planner.share(planned, Receiver(self._rank, first_of, share, runs))
        parts = [[shared.plan.parts[number] for number in chunk] for chunk in shared.plan.chunks[self._rank]]
        own_items = sorted({part.item for of_chunk in parts for part in of_chunk})
        items = {item: batch.vision_item(numbers[item]) for item in own_items}
        failures: dict[int, str] = {}
        chunks = self._read_chunks(shared.plan, parts, items, failures)
        work = VisionWork(shared.plan, chunks, shared.transfers, program)
        failed = tuple(
            self._failed(planned, items[item], item, reason) for item, reason in sorted(failures.items())
        )
        return StepVision(work, orders[self._replica], failed)

    def _read_chunks(
        self,
        plan: PlanShare,
        own: Sequence[Sequence[Part]],
        items: Mapping[int, SampleItem],
        failures: dict[int, str],
    ) -> list[Chunk]:
        """This rank's chunks, of which the parts are given; notes in `failures` which of its items did not
        decode."""
        # 1. Room for each chunk, and where in it each part of an item goes.
        chunks: list[Chunk] = []
        places: dict[tuple[str, MediaSegment, int, int], list[tuple[Part, Tensor]]] = {}
        for parts in own:
            sizes = [part.num_patches for part in parts]
            pixels = torch.empty(sum(sizes), self._patch_values, dtype=torch.uint8)
            for part, into in zip(parts, pixels.split(sizes), strict=True):
                item = items[part.item]
                places.setdefault(_file_of(item.source, item.media), []).append((part, into))
            chunks.append(Chunk(pixels, tuple(plan.items[part.item].grid_thw for part in parts)))

        # 2. A video is decoded once, however many of its items are this rank's.
        units = []
        for (source, *_), of_file in places.items():
            positions = {items[part.item].position for part, _ in of_file}
            units.append(MediaUnit(source, items[of_file[0][0].item].media, tuple(sorted(positions))))
        for unit, read in zip(units, self._reading.read(units), strict=True):
            patches = read.result
            assert isinstance(patches, MediaPatches)
            for part, into in places[_file_of(unit.source, unit.media)]:
                if patches.failure:
                    failures[part.item] = patches.failure
                item = items[part.item]
                into.copy_(_rows_of(part, plan.items[part.item].grid_thw, patches.items[item.position]))
        return chunks

    def _failed(
        self, planned: Sequence[VisionItem], item: SampleItem, number: int, reason: str
    ) -> FailedItem:
        """An item of the global batch by its place in its micro-batch."""
        place = planned[number].replica, planned[number].micro_batch
        first = number
        while first and (planned[first - 1].replica, planned[first - 1].micro_batch) == place:
            first -= 1
        return FailedItem(*place, number - first, self._sources[item.source].where(item.record), reason)


def _file_of(source: str, media: PlannedMedia) -> tuple[str, MediaSegment, int, int]:
    """What is decoded once: a file, as it is changed in an epoch."""
    return source, media.segment, media.drawn.key, media.drawn.number


def _rows_of(part: Part, grid_thw: Grid, pixels: Tensor) -> Tensor:
    """Of an item's patches [t*h*w, 3*p*p] those of a part's rows, frame after frame."""
    rows = slice(part.row, part.row + part.num_rows)
    return pixels.unflatten(0, grid_thw)[:, rows].flatten(0, 2)
