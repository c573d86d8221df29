"""Reads of files: every wanted byte by one of them, in whole blocks, nothing twice, bounded in length."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from parallel.reshard.reads import ReadPlan, Slices, plan_reads

BLOCK, CHUNK = 4, 16


def slices_of(rows: list[tuple[int, int, int, int, int]]) -> Slices:
    columns = np.array(rows, dtype=np.int64).reshape(-1, 5).T
    return Slices(columns[0].astype(np.int32), *columns[1:])


@st.composite
def wanted_slices(draw: st.DrawFn) -> list[tuple[int, int, int, int, int]]:
    """Of entries that follow each other in their files, with gaps that are padding."""
    rows = []
    for file in range(draw(st.integers(1, 2))):
        end = draw(st.integers(0, 9))
        for _ in range(draw(st.integers(0, 4))):
            start, end = end, end + draw(st.integers(1, 70))
            for _ in range(draw(st.integers(0, 2))):
                first = draw(st.integers(start, end - 1))
                rows.append((file, first, draw(st.integers(first + 1, end)), start, end))
            end += draw(st.integers(0, 7))
    return draw(st.permutations(rows))


def blocks_of(rows: list[tuple[int, int, int, int, int]]) -> set[tuple[int, int]]:
    """Every byte of every block that is touched, byte by byte."""
    return {
        (file, each)
        for file, start, stop, entry_start, entry_stop in rows
        for at in range(start, stop)
        for first in [entry_start + (at - entry_start) // BLOCK * BLOCK]
        for each in range(first, min(first + BLOCK, entry_stop))
    }


def bytes_read(plan: ReadPlan) -> list[tuple[int, int]]:
    return [
        (int(file), at)
        for file, start, stop in zip(plan.file, plan.start, plan.stop, strict=True)
        for at in range(start, stop)
    ]


@given(wanted_slices(), st.sampled_from([0, 5]))
def test_reads_hold_every_block_that_is_touched(
    rows: list[tuple[int, int, int, int, int]], gap_bytes: int
) -> None:
    plan = plan_reads(slices_of(rows), block_bytes=BLOCK, chunk_bytes=CHUNK, gap_bytes=gap_bytes)

    found = bytes_read(plan)
    needed = blocks_of(rows)
    assert needed <= set(found)
    assert len(found) == len(set(found))
    if not gap_bytes:
        assert set(found) == needed
    assert (plan.stop - plan.start <= 2 * CHUNK).all()
    assert plan.num_bytes == len(found)
    assert set(plan.files) == {row[0] for row in rows}


@given(wanted_slices())
def test_every_wanted_byte_comes_out_of_the_read_of_its_slice(
    rows: list[tuple[int, int, int, int, int]],
) -> None:
    plan = plan_reads(slices_of(rows), block_bytes=BLOCK, chunk_bytes=CHUNK, gap_bytes=3)

    served: dict[int, list[int]] = {number: [] for number in range(len(rows))}
    low, high = plan.slices.in_blocks(BLOCK)
    for read in range(len(plan)):
        for number in range(plan.first_slice[read], plan.first_slice[read + 1]):
            assert plan.slices.file[number] == plan.file[read]
            assert plan.start[read] <= low[number] < high[number] <= plan.stop[read]
            served[plan.origin[number]] += range(plan.slices.start[number], plan.slices.stop[number])
    for number, row in enumerate(rows):
        assert sorted(served[number]) == list(range(row[1], row[2]))


def test_a_large_slice_is_read_in_chunks_and_small_ones_at_once() -> None:
    large = slices_of([(0, 8, 8 + 5 * CHUNK, 8, 8 + 5 * CHUNK)])
    plan = plan_reads(large, block_bytes=BLOCK, chunk_bytes=CHUNK, gap_bytes=0)
    assert (plan.stop - plan.start).tolist() == [CHUNK] * 5

    within = slices_of([(0, 0, 16, 0, 16), (0, 5, 6, 0, 16), (0, 12, 14, 0, 16)])
    plan = plan_reads(within, block_bytes=BLOCK, chunk_bytes=CHUNK, gap_bytes=0)
    assert (plan.start.tolist(), plan.stop.tolist()) == ([0], [16])

    small = slices_of([(0, at, at + 2, at, at + 2) for at in (8, 10, 14, 40)])
    plan = plan_reads(small, block_bytes=BLOCK, chunk_bytes=CHUNK, gap_bytes=2)
    assert list(zip(plan.start.tolist(), plan.stop.tolist(), strict=True)) == [(8, 16), (40, 42)]


def test_what_changed_ranges_cost_is_little() -> None:
    """A rank of another dp wants a third of every entry: two blocks more of each at most."""
    block, size = 256 * 1024, 64 * 1024**2
    rows = [
        (file, at + size // 3 + 4, at + 2 * size // 3, at, at + size)
        for file in range(4)
        for at in range(4096, 10 * size, size)
    ]
    plan = plan_reads(slices_of(rows), block_bytes=block, chunk_bytes=16 * block, gap_bytes=65536)
    wanted = sum(stop - start for _, start, stop, _, _ in rows)
    assert wanted < plan.num_bytes <= wanted + 2 * block * len(rows)
    assert plan.num_bytes < 1.02 * wanted
