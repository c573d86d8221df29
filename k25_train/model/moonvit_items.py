"""The items of a batch for MoonViT-3D: checked, and sorted so that equal ones form one batched view. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from k25_train.config.vision import VisionConfig

Grid = tuple[int, int, int]
"""(t, h, w) of an item, in patches."""


class ItemPart(Protocol):
    """Some rows of an item, over all frames; its other rows are encoded elsewhere at the same time."""

    @property
    def row(self) -> int:
        """First row of patches."""

    @property
    def num_rows(self) -> int:
        """Rows of patches, whole squares of `merge_size`."""

    def gather(self, own: Tensor) -> Tensor:
        """[p, ...] of these rows' patches -> [t·h·w, ...] of the whole item's, in any order.

        Called once per layer, for keys and values together; sends gradients back to where rows were encoded.
        """


@dataclass(frozen=True, slots=True)
class GridRun:
    """Consecutive items with the same grid."""

    t: int
    h: int
    w: int
    num_items: int
    rows: range
    """Encoded rows of patches: all of them, unless the batch is a part of one item."""

    @property
    def length(self) -> int:
        """Encoded patches of one item."""
        return self.t * len(self.rows) * self.w


@dataclass(frozen=True, slots=True)
class PackedItems:
    """The tower's own order of a batch: sorted by length and grid, so that equal items are neighbours.

    Operations then treat equal items as one batched view instead of gathering or looping over items: the
    positions of a hundred icons of one size are made once.
    """

    grids: tuple[Grid, ...]
    """Grids in the given order."""
    item_order: tuple[int, ...]
    """Item indices in the tower's order."""
    runs: tuple[GridRun, ...]
    """Runs of equal grids, in the tower's order."""
    segments: tuple[tuple[int, int], ...]
    """(length in patches, number of items) of equal lengths, in the tower's order."""
    patch_order: Tensor | None
    """[P] int64 on the CPU: the given patches in the tower's order; None if the orders agree."""
    gather: Callable[[Tensor], Tensor] | None = None
    """`ItemPart.gather` if the batch is a part of an item, else None."""

    def feature_order(self, merge_size: int) -> Tensor:
        """[V] int64 on the CPU: the index in the tower's order of each token in the given one."""
        tower_order = gather_order([h * w // merge_size**2 for _, h, w in self.grids], self.item_order)
        return torch.argsort(tower_order)


def pack_items(grid_thw: Sequence[Grid]) -> PackedItems:
    """Choose the tower's order of items; pure."""
    # 1. Shorter items first, equal grids next to each other.
    grids = tuple((int(t), int(h), int(w)) for t, h, w in grid_thw)
    lengths = [t * h * w for t, h, w in grids]
    item_order = tuple(sorted(range(len(grids)), key=lambda item: (lengths[item], grids[item])))
    # 2. Equal grids share positions, equal lengths share a call of attention.
    runs = tuple(
        GridRun(*grid, num_items=len(list(group)), rows=range(grid[1]))
        for grid, group in itertools.groupby(grids[item] for item in item_order)
    )
    segments = tuple(
        (length, sum(run.num_items for run in group))
        for length, group in itertools.groupby(runs, key=lambda run: run.length)
    )
    # 3. Patches are moved only if the order changes.
    in_order = item_order == tuple(range(len(grids)))
    patch_order = None if in_order else gather_order(lengths, item_order)
    return PackedItems(
        grids=grids, item_order=item_order, runs=runs, segments=segments, patch_order=patch_order
    )


def pack_part(grid_thw: Sequence[Grid], part: ItemPart) -> PackedItems:
    """One part of one item as a batch; pure. Raises ValueError if there are several items."""
    if len(grid_thw) != 1:
        raise ValueError(
            f"{len(grid_thw)} grids come with a part, which belongs to one item: encode it alone"
        )
    run = GridRun(*grid_thw[0], num_items=1, rows=range(part.row, part.row + part.num_rows))
    return PackedItems(
        grids=tuple(grid_thw),
        item_order=(0,),
        runs=(run,),
        segments=((run.length, 1),),
        patch_order=None,
        gather=part.gather,
    )


def gather_order(lengths: Sequence[int], item_order: Sequence[int]) -> Tensor:
    """[sum(lengths)] int64: the rows of items of these lengths, with the items in `item_order`."""
    starts = [0, *itertools.accumulate(lengths)]
    return torch.cat([torch.arange(starts[item], starts[item + 1]) for item in item_order])


def check_grids(grid_thw: Sequence[Grid], num_patches: int, vision: VisionConfig) -> None:
    """Raise ValueError for a grid that the tower cannot encode, naming item, value and rule."""
    for item, grid in enumerate(grid_thw):
        t, h, w = grid
        if not 1 <= t <= vision.pos_emb_time:
            raise ValueError(
                f"item {item}: grid {tuple(grid)} has t={t} frames; the temporal table holds 1 to "
                f"pos_emb_time={vision.pos_emb_time}: cut a longer video into chunks"
            )
        for name, size in (("h", h), ("w", w)):
            if size < 1 or size % vision.merge_size:
                raise ValueError(
                    f"item {item}: grid {tuple(grid)} has {name}={size}; it must be a positive multiple of "
                    f"merge_size={vision.merge_size}: pad the image"
                )
            if size > vision.rope_max_grid:
                raise ValueError(
                    f"item {item}: grid {tuple(grid)} has {name}={size}; positions end at "
                    f"rope_max_grid={vision.rope_max_grid}: shrink the image"
                )
    expected = sum(t * h * w for t, h, w in grid_thw)
    if expected != num_patches:
        raise ValueError(
            f"{len(grid_thw)} items: their grids hold {expected} patches, but pixels has {num_patches} rows"
        )


def check_part(run: GridRun, num_patches: int, vision: VisionConfig) -> None:
    """Raise ValueError for a part of an item that the tower cannot encode, naming value and rule."""
    grid, rows = (run.t, run.h, run.w), run.rows
    check_grids([grid], math.prod(grid), vision)
    between_squares = rows.start % vision.merge_size == rows.stop % vision.merge_size == 0
    if not 0 <= rows.start < rows.stop <= run.h or not between_squares or run.length != num_patches:
        raise ValueError(
            f"a part of grid {grid} is rows {rows.start} to {rows.stop}, with {num_patches} patches; it must "
            f"be whole squares of merge_size={vision.merge_size} within {run.h} rows, and all their patches: "
            "cut pixels and grid at the same rows"
        )
