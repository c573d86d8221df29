"""Which queries of a rank attend to which tokens of which ranks, as indices and in the form of kernels.

A rank's keys come in blocks, each of the tokens of some ranks: of all at once, or of one after another. A
piece of a document attends to the document's earlier tokens in the block, and causally to itself:

    block of rank 0            block of rank 1                 rank 1 has the pieces a and b of a document,
    ┌──────┬──────┐            ┌──────┬──────┐                 rank 0 those before a and behind b
    │ 0..  │ ..T  │            │  a   │  b   │
    └──────┴──────┘            └──────┴──────┘
  a   ████                       ◣                             ████  all queries attend to all keys
  b   ████                      ████     ◣                      ◣    each to itself and the earlier ones

The keys of a segment, which is a piece with what it attends to in a block, are taken out of the block by
index; if two pieces attend to a token it is taken twice. So any kernel for packed documents can be used, with
as many keys as it has to read, and none of them knows about pieces.

Shapes: t tokens of a rank, S ranks of a block, N segments of it, q queries and K keys of all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.context.plan import ContextPlan
from parallel.host.upload import upload


class Segment(NamedTuple):
    """A piece of a document with the keys that it attends to in a block."""

    queries: int
    """Number of queries."""
    keys: int
    """Number of keys. In a causal block the last ones are the queries' own."""


@dataclass(frozen=True, eq=False)
class KeyBlock:
    """What a rank's queries attend to among the tokens of some ranks."""

    sources: tuple[int, ...]
    """The ranks whose tokens these are, in the order in which they lie in memory."""
    is_causal: bool
    """Whether a segment's last keys are the queries' own, to which these attend causally: it is so for all
    segments if the rank itself is among the sources, and else for none."""
    segments: tuple[Segment, ...]
    """Of those pieces of the rank that attend to anything here, in the order of its tokens."""
    rows: slice | Tensor
    """Where the queries are among the rank's tokens: a range, or [q] int64."""
    keys: Tensor
    """Where the keys are among the block's S x t tokens, [K] int64, segment by segment."""
    bounds: Tensor
    """[2, N + 1] int32: queries, and keys, before each segment and behind the last, for kernels."""

    @property
    def num_queries(self) -> int:
        """Number of queries that attend to anything in this block."""
        return sum(segment.queries for segment in self.segments)

    @cached_property
    def longest(self) -> Segment:
        """The most queries and the most keys that a segment has."""
        return Segment(*(max(sizes) for sizes in zip(*self.segments, strict=True)))

    @cached_property
    def first_and_last_keys(self) -> Tensor:
        """[2, q] int32: the first and the last key that each query attends to."""
        queries, keys = self.bounds
        rows = torch.arange(self.num_queries, device=keys.device, dtype=torch.int32)
        segment = torch.searchsorted(queries, rows, right=True) - 1
        last = keys[segment + 1] - 1
        if self.is_causal:
            last = last - (queries[segment + 1] - 1 - rows)
        return torch.stack((keys[segment], last))


class ContextShard:
    """A rank's pieces of a micro-batch, and the blocks of keys that they attend to."""

    def __init__(self, plan: ContextPlan, rank: int, device: torch.device) -> None:
        """`rank` is the place among the ranks that share the micro-batch; `device` is where indices go."""
        self.plan, self.rank, self._device = plan, rank, device
        self._blocks: dict[tuple[tuple[int, ...], ...], list[KeyBlock]] = {}

    @classmethod
    def none(cls) -> "ContextShard":
        """Of a micro-batch that is on one rank: there are no blocks."""
        return cls(ContextPlan((), frozenset(), ((),)), 0, torch.device("cpu"))

    def blocks(self, order: tuple[tuple[int, ...], ...]) -> list[KeyBlock]:
        """The blocks for an order in which the tokens of ranks come; made once, for all layers.

        Tensors are copied to the device, for which nothing waits.
        """
        if order not in self._blocks:
            places = _places(self.plan)
            self._blocks[order] = [
                _key_block(self.plan, self.rank, sources, places, self._device) for sources in order
            ]
        return self._blocks[order]


class _Place(NamedTuple):
    """Where a piece of a document is."""

    start: int
    stop: int
    rank: int
    first_row: int
    """Of its first token, among its rank's."""


def _places(plan: ContextPlan) -> dict[int, list[_Place]]:
    """Document -> its pieces in order; padding has none."""
    places: dict[int, list[_Place]] = {}
    for rank, pieces in enumerate(plan.pieces):
        row = 0
        for document, start, stop in pieces:
            if document not in plan.padding:
                places.setdefault(document, []).append(_Place(start, stop, rank, row))
            row += stop - start
    for of_document in places.values():
        of_document.sort()
    return places


def _key_block(
    plan: ContextPlan,
    rank: int,
    sources: tuple[int, ...],
    places: dict[int, list[_Place]],
    device: torch.device,
) -> KeyBlock:
    # 1. Ranges of rows, of queries and of the keys of each segment.
    first_in_block = {source: index * plan.num_tokens for index, source in enumerate(sources)}
    segments: list[Segment] = []
    query_ranges: list[tuple[int, int]] = []
    key_ranges: list[tuple[int, int]] = []
    row = 0
    for document, start, stop in plan.pieces[rank]:
        num_keys = 0
        for place in places.get(document, ()):
            if place.start > start:
                break
            if place.rank in first_in_block:
                num_keys += place.stop - place.start
                key_ranges.append((
                    first_in_block[place.rank] + place.first_row,
                    place.stop - place.start,
                ))  # fmt: skip
        if num_keys:
            segments.append(Segment(stop - start, num_keys))
            query_ranges.append((row, stop - start))
        row += stop - start
    # 2. The same as tensors.
    bounds = torch.zeros(2, len(segments) + 1, dtype=torch.int32)
    if segments:
        bounds[:, 1:] = torch.tensor(segments, dtype=torch.int32).T.cumsum(1)
    return KeyBlock(
        sources=sources,
        is_causal=rank in first_in_block,
        segments=tuple(segments),
        rows=_rows(query_ranges, device),
        keys=upload(_indices(key_ranges), device),
        bounds=upload(bounds, device),
    )


def _rows(ranges: Sequence[tuple[int, int]], device: torch.device) -> slice | Tensor:
    """Rows of ranges (first, number) in order: as one range where they follow one another."""
    if not ranges:
        return slice(0, 0)
    begin, (last, length) = ranges[0][0], ranges[-1]
    if last + length - begin == sum(number for _, number in ranges):
        return slice(begin, last + length)
    return upload(_indices(ranges), device)


def _indices(ranges: Sequence[tuple[int, int]]) -> Tensor:
    """The rows of all ranges (first, number), [rows] int64."""
    if not ranges:
        return torch.zeros(0, dtype=torch.int64)
    first, number = torch.tensor(ranges, dtype=torch.int64).unbind(1)
    before = number.cumsum(0) - number
    return torch.arange(int(number.sum())) + torch.repeat_interleave(first - before, number)
