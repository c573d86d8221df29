"""What one rank has to know of a step's vision plan: of tens of thousands of items those that it encodes, and
those whose features it receives. Pure.

`share_of` takes it from a whole `VisionPlan`. `plan_share` makes the same without the rest: for the items of
thousands of ranks, making objects would take longer than assigning them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from parallel.dep.assignment import assign_items
from parallel.dep.cost import EncoderCost
from parallel.dep.grid import MERGE_EDGE
from parallel.dep.plan import (
    Part,
    VisionItem,
    VisionPlan,
    build_plan,
    check_items,
    chunks_of_ranks,
)
from parallel.dep.transfers import Receiver, Transfer, transfers_among, transfers_of


@dataclass(frozen=True, slots=True)
class PlanShare:
    """A rank's share of a `VisionPlan`, under the same numbers of items, parts and chunks."""

    items: Mapping[int, VisionItem]
    """Items of the parts."""
    parts: Mapping[int, Part]
    """Parts that the rank encodes or, in the first stage of a replica, receives rows of."""
    chunks: Mapping[int, tuple[tuple[int, ...], ...]]
    """{the rank: [chunk] -> numbers of the parts that it encodes together}."""
    split: Mapping[int, tuple[Part, ...]]
    """Item of which the rank encodes one part of several -> all of its parts, by row."""
    is_split: bool
    """Whether any item of the step is encoded by several ranks."""

    def parts_of(self, item: int) -> tuple[Part, ...]:
        """The parts of an item of which this rank encodes one, by row; several if it is split."""
        own = self.split.get(item)
        return own or tuple(part for part in self.parts.values() if part.item == item)


NO_SHARE = PlanShare(items={}, parts={}, chunks={}, split={}, is_split=False)
"""Where nothing is encoded."""


class Shared(NamedTuple):
    """A share of a plan, with what passes between ranks."""

    plan: PlanShare
    transfers: list[Transfer]
    """As `transfers_of` gives them, of which the rank is an end."""


def share_of(plan: VisionPlan, receiver: Receiver) -> Shared:
    """A rank's share of a plan."""
    rank = receiver.rank
    transfers = transfers_of(plan, receiver)
    parts = {number: plan.parts[number] for number in _parts_in(transfers)}
    own = {part.item for part in parts.values() if part.rank == rank} if plan.is_split else set()
    split = {item: of_item for item in sorted(own) if len(of_item := plan.parts_of(item)) > 1}
    items = {part.item: plan.items[part.item] for part in parts.values()}
    return Shared(PlanShare(items, parts, {rank: plan.chunks[rank]}, split, plan.is_split), transfers)


def plan_share(
    items: Sequence[VisionItem],
    num_ranks: int,
    cost: EncoderCost,
    receiver: Receiver,
    *,
    max_patches_per_chunk: int,
    split: bool,
) -> Shared:
    """A rank's share of what `plan_vision` plans; arguments and errors are the same."""
    sizes = _Sizes(items)
    if sizes.are_wrong() or num_ranks < 1 or max_patches_per_chunk < 1:
        check_items(items, num_ranks, max_patches_per_chunk)
    # 1. Who encodes what: one item after the other, the costliest first.
    row_costs = sizes.row_costs(cost)
    ranks = assign_items(row_costs, sizes.token_rows.tolist(), num_ranks, split)
    if any(len(of_item) > 1 for of_item in ranks):
        # Parts are few then, and of another number than items.
        chunks = chunks_of_ranks(items, ranks, row_costs, num_ranks, max_patches_per_chunk)
        return share_of(build_plan(items, ranks, chunks, cost), receiver)

    # 2. Whole items by micro-batch; the sort is stable, so within one they stay by replica and index.
    rank_of = np.array([rank for (rank,) in ranks], dtype=np.int64)
    order = np.argsort(sizes.micro_batches, kind="stable")
    own = order[rank_of[order] == receiver.rank].tolist()
    chunks_of_rank = fill_chunks(own, items, max_patches_per_chunk)
    return share_of_whole(items, rank_of, chunks_of_rank, receiver, sizes)


def share_of_whole(
    items: Sequence[VisionItem],
    rank_of: np.ndarray,
    chunks: Sequence[Sequence[int]],
    receiver: Receiver,
    sizes: "_Sizes | None" = None,
) -> Shared:
    """The share of a rank where no item is split, so that a part has the number of its item.

    Args:
        items: by replica, then micro-batch, then the order of their placeholders.
        rank_of: [item] -> rank that encodes it.
        chunks: [chunk of the receiver] -> its items.
        receiver: whose share it is.
        sizes: of the items, where they are known.
    """
    sizes = sizes or _Sizes(items)
    takes_part = rank_of == receiver.rank
    if receiver.replica is not None:
        takes_part |= sizes.replicas == receiver.replica
    offsets = sizes.offsets()
    found: dict[int, Part] = {}
    for number in np.flatnonzero(takes_part).tolist():
        item, rank = items[number], int(rank_of[number])
        grid = item.grid_thw
        found[number] = Part(number, rank, 0, grid.h, int(offsets[number]), item.num_tokens, item.num_patches)
    transfers = transfers_among(found.items(), items, receiver)
    parts = {number: found[number] for number in _parts_in(transfers)}
    own_items = {number: items[number] for number in parts}
    frozen = {receiver.rank: tuple(map(tuple, chunks))}
    return Shared(PlanShare(own_items, parts, frozen, {}, is_split=False), transfers)


def _parts_in(transfers: Sequence[Transfer]) -> list[int]:
    """Numbers of the parts in transfers."""
    return sorted({each.part for transfer in transfers for rows in transfer.values() for each in rows})


class _Sizes:
    """Items as arrays [n] of int64."""

    def __init__(self, items: Sequence[VisionItem]) -> None:
        numbers = [(*item.grid_thw, item.replica, item.micro_batch) for item in items]
        columns = np.array(numbers, dtype=np.int64).reshape(-1, 5).T
        self.frames, self.rows, self.columns, self.replicas, self.micro_batches = columns
        self.patches = self.frames * self.rows * self.columns
        self.token_rows, self.token_columns = self.rows // MERGE_EDGE, self.columns // MERGE_EDGE

    def are_wrong(self) -> bool:
        """Whether `check_items` would raise for them."""
        # One key for replica and micro-batch, in the order in which they have to be.
        width = int(self.micro_batches.max(initial=0)) + 1
        keys = self.replicas * width + self.micro_batches
        is_odd = (self.rows % MERGE_EDGE != 0) | (self.columns % MERGE_EDGE != 0)
        is_empty = (self.frames < 1) | (self.rows < 1) | (self.columns < 1) | (self.micro_batches < 0)
        return bool(np.any(is_odd | is_empty | (self.replicas < 0)) or np.any(np.diff(keys) < 0))

    def row_costs(self, cost: EncoderCost) -> list[int]:
        """[item] -> `EncoderCost.of_row`; whole numbers below 2^63 for items of up to 2^18 patches."""
        of_patch = cost.per_patch + cost.per_pair * self.patches
        of_row = MERGE_EDGE * self.frames * self.columns * of_patch + self.token_columns * cost.per_token
        costs: list[int] = of_row.tolist()
        return costs

    def offsets(self) -> np.ndarray:
        """[item] -> first row of its features in those of its micro-batch."""
        tokens = self.token_rows * self.token_columns
        before = np.cumsum(tokens) - tokens
        is_first = np.ones(len(tokens), dtype=np.bool_)
        is_first[1:] = (np.diff(self.replicas) != 0) | (np.diff(self.micro_batches) != 0)
        starts = np.flatnonzero(is_first)
        return before - np.repeat(before[starts], np.diff(np.append(starts, len(tokens))))


def fill_chunks(own: Iterable[int], items: Sequence[VisionItem], max_patches: int) -> list[list[int]]:
    """Items of a rank, by their numbers in order, in chunks of at most `max_patches`, or of one item."""
    chunks: list[list[int]] = []
    free = 0
    for number in own:
        num_patches = items[number].num_patches
        if num_patches > free:
            chunks.append([])
            free = max_patches
        chunks[-1].append(number)
        free -= num_patches
    return chunks
