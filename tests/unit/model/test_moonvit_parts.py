"""The vision tower on parts of an item, side by side, against the tower on the whole item."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from k25_train.model.moonvit import MoonViT3D
from k25_train.model.moonvit_items import Grid
from tests.helpers.hf_reference import tiny_vision_config

CASES: list[tuple[Grid, list[int]]] = [
    ((1, 8, 4), [4, 4]),
    ((1, 14, 6), [6, 4, 4]),
    ((1, 20, 10), [2, 16, 2]),
    ((3, 6, 4), [2, 2, 2]),
    ((4, 18, 2), [10, 8]),
    ((2, 4, 6), [4]),
]
"""Grids, and rows of patches of each part."""


class Meeting:
    """Where the parts of one item, each in its own thread, put their keys and values together."""

    def __init__(self, num_parts: int) -> None:
        self._barrier = threading.Barrier(num_parts, timeout=30)
        self._blocks: list[Tensor] = [torch.empty(0)] * num_parts

    def gather(self, place: int, own: Tensor) -> Tensor:
        self._blocks[place] = own
        self._barrier.wait()
        gathered = torch.cat(self._blocks)
        self._barrier.wait()
        return gathered


@dataclass(frozen=True)
class SimulatedPart:
    """One part; gradients of the others' keys and values flow through the graph that the threads share."""

    row: int
    num_rows: int
    place: int = 0
    meeting: Meeting | None = None

    def gather(self, own: Tensor) -> Tensor:
        return own if self.meeting is None else self.meeting.gather(self.place, own)


@pytest.fixture(scope="module")
def tower() -> MoonViT3D:
    torch.manual_seed(5)
    tower = MoonViT3D(tiny_vision_config())
    with torch.no_grad():
        for block in tower.encoder.blocks:
            block.wqkv.weight.mul_(2)  # so that attention tells keys apart
    return tower


def pixels_of(grid: Grid) -> Tensor:
    return torch.randn(math.prod(grid), 588, generator=torch.Generator().manual_seed(1))


def rows_of(pixels: Tensor, grid: Grid, part: SimulatedPart) -> Tensor:
    t, h, w = grid
    return pixels.view(t, h, w, 588)[:, part.row : part.row + part.num_rows].reshape(-1, 588)


def side_by_side(tower: MoonViT3D, grid: Grid, rows: Sequence[int]) -> Tensor:
    """The features of all parts, one after another."""
    meeting = Meeting(len(rows))
    starts = list(accumulate(rows, initial=0))
    parts = [SimulatedPart(starts[place], size, place, meeting) for place, size in enumerate(rows)]

    def encode(part: SimulatedPart) -> Tensor:
        return tower(rows_of(pixels_of(grid), grid, part), [grid], part)

    with ThreadPoolExecutor(len(parts)) as threads:
        return torch.cat(list(threads.map(encode, parts)))


def gradients_of(tower: MoonViT3D, features: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    tower.zero_grad()
    (features * weights).sum().backward()
    return {name: each.grad for name, each in tower.named_parameters() if each.grad is not None}


@pytest.mark.parametrize(("grid", "rows"), CASES)
def test_parts_side_by_side_are_the_whole_item(tower: MoonViT3D, grid: Grid, rows: list[int]) -> None:
    expected, found = tower(pixels_of(grid), [grid]), side_by_side(tower, grid, rows)
    assert expected.std() > 0.5
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    whole, parts = gradients_of(tower, expected), gradients_of(tower, found)
    assert parts.keys() == whole.keys() == dict(tower.named_parameters()).keys()
    for name, gradient in parts.items():
        assert (gradient - whole[name]).norm() <= 1e-5 * whole[name].norm(), name


def test_a_part_needs_the_other_parts(tower: MoonViT3D) -> None:
    grid = (1, 8, 4)
    part = SimulatedPart(0, 4)
    with torch.no_grad():
        alone = tower(rows_of(pixels_of(grid), grid, part), [grid], part)
        assert (alone - tower(pixels_of(grid), [grid])[: len(alone)]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("grids", "part", "num_patches", "message"),
    [
        ([(1, 8, 4)], SimulatedPart(1, 4), 16, "rows 1 to 5"),
        ([(1, 8, 4)], SimulatedPart(2, 3), 12, "rows 2 to 5"),
        ([(1, 8, 4)], SimulatedPart(6, 4), 16, "within 8 rows"),
        ([(1, 8, 4)], SimulatedPart(4, 0), 0, "rows 4 to 4"),
        ([(1, 8, 4)], SimulatedPart(4, 4), 32, "with 32 patches"),
        ([(1, 7, 4)], SimulatedPart(0, 4), 16, "h=7"),
        ([(1, 8, 4), (1, 2, 2)], SimulatedPart(0, 4), 16, "2 grids come with a part"),
    ],
)
def test_what_is_no_part_is_refused(
    tower: MoonViT3D, grids: list[Grid], part: SimulatedPart, num_patches: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tower(torch.zeros(num_patches, 588), grids, part)
