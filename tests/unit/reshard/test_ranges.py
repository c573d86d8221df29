"""Overlaps and coverage of ranges, compared with sets of single elements."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.reshard.ranges import CoverageError, Ranges, check_covered, overlaps

NAMES = [f"tensor{number}" for number in range(4)]


@st.composite
def tensors(draw: st.DrawFn) -> list[int]:
    """Elements of each."""
    return draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))


@st.composite
def ranges_within(draw: st.DrawFn, numels: list[int]) -> list[tuple[int, int, int]]:
    """Any ranges, empty ones and repeated ones among them."""
    rows = []
    for _ in range(draw(st.integers(0, 6))):
        tensor = draw(st.integers(0, len(numels) - 1))
        start = draw(st.integers(0, numels[tensor]))
        rows.append((tensor, start, draw(st.integers(start, numels[tensor]))))
    return rows


@st.composite
def cut_tensors(draw: st.DrawFn, numels: list[int]) -> list[tuple[int, int, int]]:
    """All elements, in ranges by tensor and start, some of them empty."""
    rows = []
    for tensor, numel in enumerate(numels):
        points = sorted([0, numel, *draw(st.lists(st.integers(0, numel), max_size=4))])
        rows += [(tensor, first, last) for first, last in pairwise(points)]
    return rows


def elements(rows: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    return [(tensor, at) for tensor, start, stop in rows for at in range(start, stop)]


def rows_of(ranges: Ranges) -> Iterator[tuple[int, int, int]]:
    yield from zip(ranges.tensor.tolist(), ranges.start.tolist(), ranges.stop.tolist(), strict=True)


@given(st.data())
def test_every_wanted_element_is_found_once_where_it_is_stored(data: st.DataObject) -> None:
    numels = data.draw(tensors())
    wanted, stored = data.draw(ranges_within(numels)), data.draw(cut_tensors(numels))

    found = overlaps(Ranges.of(wanted), Ranges.of(stored), np.array(numels), NAMES)

    by_wanted: dict[int, list[tuple[int, int]]] = {number: [] for number in range(len(wanted))}
    for number, place, row in zip(found.wanted, found.stored, rows_of(found.ranges), strict=True):
        assert set(elements([row])) <= set(elements([stored[place]]))
        assert row[1] < row[2]
        by_wanted[number] += elements([row])
    assert by_wanted == {number: elements([row]) for number, row in enumerate(wanted)}


@given(st.data())
def test_coverage_is_what_counting_elements_says(data: st.DataObject) -> None:
    numels = data.draw(tensors())
    rows = data.draw(st.one_of(cut_tensors(numels), ranges_within(numels)))
    expected = [(tensor, at) for tensor, numel in enumerate(numels) for at in range(numel)]
    rows = data.draw(st.permutations(rows))

    if sorted(elements(rows)) == expected:
        check_covered(Ranges.of(rows), np.array(numels), NAMES)
        return
    with pytest.raises(CoverageError) as caught:
        check_covered(Ranges.of(rows), np.array(numels), NAMES)
    # It names a tensor of which that is so.
    number = NAMES.index(str(caught.value).split(":")[0])
    assert sorted(elements([row for row in rows if row[0] == number])) != [
        each for each in expected if each[0] == number
    ]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([(0, 0, 4), (0, 6, 10), (1, 0, 3)], "tensor0: elements 4 to 6 are missing"),
        ([(0, 0, 10)], "tensor1: elements 0 to 3 are missing"),
        ([(0, 0, 10), (1, 1, 3)], "tensor1: elements 0 to 1 are missing"),
        ([(0, 0, 6), (0, 4, 10), (1, 0, 3)], "tensor0: elements 4 to 6 are there twice"),
        ([(0, 0, 10), (1, 0, 3), (1, 0, 3)], "tensor1: elements 0 to 3 are there twice"),
        ([(0, 0, 11), (1, 0, 3)], "tensor0: elements 0 to 11 are not within its 10"),
        ([(0, -1, 10), (1, 0, 3)], "tensor0: elements -1 to 10 are not within its 10"),
        ([(0, 4, 2)], "tensor0: elements 4 to 2 are not within its 10"),
    ],
)
def test_gaps_and_double_coverage_are_named(rows: list[tuple[int, int, int]], text: str) -> None:
    with pytest.raises(CoverageError, match=text):
        check_covered(Ranges.of(rows), np.array([10, 3]), NAMES)


def test_what_is_not_stored_is_named() -> None:
    stored = Ranges.of([(0, 0, 4), (0, 6, 10)])
    with pytest.raises(CoverageError, match="tensor0: of elements 2 to 8 only 4 are stored"):
        overlaps(Ranges.of([(0, 0, 3), (0, 2, 8)]), stored, np.array([10, 3]), NAMES)
    with pytest.raises(CoverageError, match="tensor1: elements 0 to 4 are not within its 3"):
        overlaps(Ranges.of([(1, 0, 4)]), stored, np.array([10, 3]), NAMES)


def test_elements_are_counted_beyond_32_bits() -> None:
    numels = np.array([2**41, 2**42 + 3])
    stored = Ranges.of([(0, 0, 2**41), (1, 0, 2**42), (1, 2**42, 2**42 + 3)])
    found = overlaps(Ranges.of([(1, 2**42 - 1, 2**42 + 2)]), stored, numels, NAMES)
    assert list(rows_of(found.ranges)) == [(1, 2**42 - 1, 2**42), (1, 2**42, 2**42 + 2)]
    check_covered(stored, numels, NAMES)
