"""Which rank encodes which image of the global batch. Pure; standard library only.

Every rank of the job has a replica of the vision tower. In each training step an item, which is an image or
a chunk of a video, is encoded by one rank, whichever has the least to do, or by several, and its features go
to the first pipeline stage of the replica that owns the sample, there to the ranks that hold its tokens
(`transfers.py`). All ranks know the sizes of all items and compute this plan locally, without any
communication. That rests on these invariants:

1. Every row of patches of every item is encoded exactly once, and the parts of one item by different ranks.
2. The features of the parts of a micro-batch, at their offsets, tile its features without gap or overlap.
3. No rank's cost is above both 1.02 times the mean and the sum of the mean and the costliest item. `split`
   cuts every item that costs more than 1.02 times the mean and, if ranks are still above that, each item that
   fits on no rank, into parts of equally many rows of tokens; an item of one such row is never cut. With
   three or more items per rank all ranks stay within 1.02; with fewer, rows can be too coarse.
4. A chunk has at most `max_patches_per_chunk` patches, or is one part; a part of a split item is a chunk.
5. Every rank encodes its parts of split items first, at the same time as the other ranks of the item, with
   which it exchanges keys and values in every layer. All ranks take split items in one order: the first that
   is not done has the attention of all its ranks, so they never wait for one another in a cycle. The order
   is from cheap to costly, so that the fewest ranks wait for the costliest. Whole items follow by
   micro-batch, replica and index.
6. Equal arguments give equal plans in every process: costs are whole numbers, whose sums are exact in any
   order, and ties are broken by item and rank.
7. Legal are ranks without items, replicas and micro-batches without images, and no items at all.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from parallel.dep.assignment import assign_items, equal_rows
from parallel.dep.cost import EncoderCost
from parallel.dep.grid import MERGE_EDGE, Grid


@dataclass(frozen=True, slots=True)
class VisionItem:
    """One image or video chunk of the global batch."""

    grid_thw: Grid
    """Size in patches."""
    replica: int
    """Data-parallel rank that owns its sample."""
    micro_batch: int
    """Number of its micro-batch within the replica."""

    @property
    def num_patches(self) -> int:
        """Patches of all its frames."""
        return self.grid_thw.num_patches

    @property
    def num_tokens(self) -> int:
        """Rows of its features."""
        return self.grid_thw.num_tokens


class Part(NamedTuple):
    """What one rank encodes of one item: whole rows of tokens, over all frames.

    A tuple, because a step has tens of thousands and a frozen dataclass takes three times as long to create.
    """

    item: int
    """Number of the item in the global batch."""
    rank: int
    """Global rank that encodes it."""
    row: int
    """First row of patches."""
    num_rows: int
    """Rows of patches; all that the item has unless it is split."""
    offset: int
    """First row of its features in the features [V, D] of its micro-batch."""
    num_tokens: int
    """Rows of its features."""
    num_patches: int
    """Patches over all frames."""


@dataclass(frozen=True, slots=True)
class VisionPlan:
    """Who encodes what in one training step, and in which order."""

    items: tuple[VisionItem, ...]
    """Items of the global batch, by replica, micro-batch and index in it."""
    num_ranks: int
    """Ranks of the job."""
    parts: tuple[Part, ...]
    """By item, then by row."""
    chunks: tuple[tuple[tuple[int, ...], ...], ...]
    """[rank][chunk] -> numbers of the parts that are encoded together."""
    costs: tuple[int, ...]
    """[rank] -> cost of its parts, in the unit of `EncoderCost`."""

    @property
    def imbalance(self) -> float:
        """Cost of the busiest rank over the mean of all ranks; 1 if there is nothing to encode."""
        total = sum(self.costs)
        return max(self.costs) * self.num_ranks / total if total else 1.0

    @property
    def is_split(self) -> bool:
        """Whether any item is encoded by several ranks."""
        return len(self.parts) > len(self.items)

    def parts_of(self, item: int) -> tuple[Part, ...]:
        """The parts of an item, by row; several if it is split."""
        first = bisect_left(self.parts, item, key=lambda part: part.item)
        last = bisect_right(self.parts, item, lo=first, key=lambda part: part.item)
        return self.parts[first:last]


def plan_vision(
    items: Sequence[VisionItem],
    num_ranks: int,
    cost: EncoderCost,
    *,
    max_patches_per_chunk: int,
    split: bool,
) -> VisionPlan:
    """Divide the items of a global batch among all ranks; see the invariants above.

    Args:
        items: by replica, then micro-batch, then the order of their placeholders.
        num_ranks: size of the job.
        cost: what the plan balances.
        max_patches_per_chunk: bound on what a rank encodes at a time, hence on its activations.
        split: whether an item may be encoded by several ranks.

    Raises ValueError for grids that are not made of whole squares, items out of order, and bounds below 1.
    """
    check_items(items, num_ranks, max_patches_per_chunk)
    row_costs = [cost.of_row(item.grid_thw) for item in items]
    num_rows = [item.grid_thw.num_token_rows for item in items]
    ranks = assign_items(row_costs, num_rows, num_ranks, split)
    return build_plan(
        items, ranks, chunks_of_ranks(items, ranks, row_costs, num_ranks, max_patches_per_chunk), cost
    )


def build_plan(
    items: Sequence[VisionItem],
    ranks: Sequence[tuple[int, ...]],
    chunks: Sequence[Sequence[Sequence[int]]],
    cost: EncoderCost,
) -> VisionPlan:
    """The plan in which the given ranks encode the given chunks.

    Args:
        items: by replica, then micro-batch, then the order of their placeholders.
        ranks: [item] -> ranks that encode it, by row.
        chunks: [rank][chunk] -> numbers of the parts that are encoded together; parts by item, then row.
        cost: unit of `VisionPlan.costs`.
    """
    # 1. Parts, each with its place in the micro-batch's features.
    parts = tuple(_parts(items, ranks))
    # 2. The balance that results.
    costs = [0] * len(chunks)
    for part in parts:
        costs[part.rank] += part.num_rows // MERGE_EDGE * cost.of_row(items[part.item].grid_thw)
    frozen = tuple([tuple(map(tuple, of_rank)) for of_rank in chunks])
    return VisionPlan(tuple(items), len(chunks), parts, frozen, tuple(costs))


def check_items(items: Sequence[VisionItem], num_ranks: int, max_patches_per_chunk: int) -> None:
    """Raise the errors of `plan_vision`."""
    for name, value in (("num_ranks", num_ranks), ("max_patches_per_chunk", max_patches_per_chunk)):
        if value < 1:
            raise ValueError(f"{name} is {value}, must be at least 1: set it to what the job has")
    last = (0, 0)
    for number, item in enumerate(items):
        t, h, w = item.grid_thw
        if min(t, h, w) < 1 or h % MERGE_EDGE or w % MERGE_EDGE:
            raise ValueError(
                f"items[{number}] has grid_thw={(t, h, w)}: frames must be at least 1, rows and columns "
                f"positive multiples of {MERGE_EDGE}; pad it to whole squares of that edge"
            )
        # `_parts` counts offsets, and `chunks_of_ranks` sorts, by this order.
        key = (item.replica, item.micro_batch)
        if key < last or item.micro_batch < 0:
            raise ValueError(
                f"items[{number}] has (replica, micro_batch)={key} after {last}: must count from 0 and not "
                "decrease; sort items by replica, then micro-batch"
            )
        last = key


def chunks_of_ranks(
    items: Sequence[VisionItem],
    ranks: Sequence[tuple[int, ...]],
    row_costs: Sequence[int],
    num_ranks: int,
    max_patches: int,
) -> list[list[list[int]]]:
    """[rank][chunk] -> numbers of parts."""
    first_part = list(accumulate(map(len, ranks), initial=0))
    chunks: list[list[list[int]]] = [[] for _ in range(num_ranks)]

    # 1. Parts of split items, a chunk each, in one order on all ranks: from cheap to costly (invariant 5).
    split = [item for item in range(len(items)) if len(ranks[item]) > 1]
    for item in sorted(split, key=lambda item: items[item].grid_thw.h * row_costs[item]):
        for part, rank in enumerate(ranks[item], first_part[item]):
            chunks[rank].append([part])

    # 2. Whole items by micro-batch; the sort is stable, so within one they stay by replica and index.
    whole = [item for item in range(len(items)) if len(ranks[item]) == 1]
    free_patches = [0] * num_ranks  # of the last chunk of each rank
    for item in sorted(whole, key=lambda item: items[item].micro_batch):
        part, rank, num_patches = first_part[item], ranks[item][0], items[item].num_patches
        if num_patches > free_patches[rank]:
            chunks[rank].append([])
            free_patches[rank] = max_patches
        chunks[rank][-1].append(part)
        free_patches[rank] -= num_patches
    return chunks


def _parts(items: Sequence[VisionItem], ranks: Sequence[tuple[int, ...]]) -> Iterator[Part]:
    """All parts, by item and row."""
    micro_batch, offset = (0, 0), 0
    for number, item in enumerate(items):
        if (item.replica, item.micro_batch) != micro_batch:
            micro_batch, offset = (item.replica, item.micro_batch), 0
        # Equal shares of rows, stacked; offsets run on over the items of a micro-batch.
        grid, row = item.grid_thw, 0
        shares = equal_rows(grid.num_token_rows, len(ranks[number]))
        for rank, num_token_rows in zip(ranks[number], shares, strict=True):
            num_rows = MERGE_EDGE * num_token_rows
            num_tokens = num_token_rows * grid.num_token_columns
            num_patches = grid.t * num_rows * grid.w
            yield Part(number, rank, row, num_rows, offset, num_tokens, num_patches)
            row += num_rows
            offset += num_tokens
