"""Which rows go where: each row once, to the rank that holds its placeholder."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.dep.cost import EncoderCost
from parallel.dep.grid import Grid
from parallel.dep.plan import VisionItem, VisionPlan, plan_vision
from parallel.dep.plan_share import plan_share, share_of
from parallel.dep.transfers import Receiver, RowRun, Stretch, of_whole_replica, runs_of, transfers_of
from tests.helpers.held_rows import made_up_runs, rows_of

SETTINGS = settings(derandomize=True, max_examples=100, deadline=None)
COST = EncoderCost(per_patch=900, per_pair=3, per_token=50)
NUM_MICRO_BATCHES = 3


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[VisionItem], int, int, int, bool, int]:
    """Items, replicas, ranks that share a micro-batch's tokens, stages, whether items are split, a seed."""
    seed, cp = draw(st.integers(0, 10**6)), draw(st.sampled_from((1, 2, 3, 4)))
    replicas, pp, split = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.booleans())
    choose = random.Random(seed)
    items = [
        VisionItem(
            Grid(1, 2 * choose.randint(1, 8), 2 * choose.randint(1, 8)),
            choose.randrange(replicas),
            choose.randrange(NUM_MICRO_BATCHES),
        )
        for _ in range(draw(st.integers(0, 25)))
    ]
    return sorted(items, key=lambda each: (each.replica, each.micro_batch)), replicas, cp, pp, split, seed


@SETTINGS
@given(cases())
def test_every_row_arrives_once_where_its_placeholder_is(
    case: tuple[list[VisionItem], int, int, int, bool, int],
) -> None:
    items, replicas, cp, pp, split, seed = case
    num_ranks = pp * replicas * cp
    runs = made_up_runs(items, cp, seed)
    plan = plan_vision(items, num_ranks, COST, max_patches_per_chunk=200, split=split)
    receivers = [
        Receiver(rank, rank // cp if rank < replicas * cp else None, NUM_MICRO_BATCHES, runs)
        for rank in range(num_ranks)
    ]
    of_ranks = [transfers_of(plan, receiver) for receiver in receivers]

    # 1. Both ends of each transfer have the same rows; nobody has others' transfers.
    for number in range(NUM_MICRO_BATCHES):
        pairs = {pair for transfers in of_ranks for pair in transfers[number]}
        for rank, transfers in enumerate(of_ranks):
            assert transfers[number].keys() == {pair for pair in pairs if rank in pair}
        for pair in pairs:
            assert of_ranks[pair[0]][number][pair] == of_ranks[pair[1]][number][pair]

    # 2. What a rank receives tiles its rows, each from the rank that encodes it.
    for replica in range(replicas):
        for number in range(NUM_MICRO_BATCHES):
            of_micro_batch = rows_of(items, replica, number)
            for rank in range(replica * cp, (replica + 1) * cp):
                held = [
                    row
                    for run in runs(replica, number)
                    if run.rank == rank
                    for row in range(run.start, min(run.stop, of_micro_batch))
                ]
                assert received(plan, of_ranks[rank][number], rank) == dict(enumerate(held))

    # 3. A rank that plans its own share alone finds the same.
    for receiver in receivers:
        own = plan_share(items, num_ranks, COST, receiver, max_patches_per_chunk=200, split=split)
        assert own == share_of(plan, receiver)


def received(plan: VisionPlan, transfer: dict[tuple[int, int], list[Stretch]], rank: int) -> dict[int, int]:
    """Row of a rank's features -> row of its micro-batch's."""
    found: dict[int, int] = {}
    for (sender, receiver), stretches in transfer.items():
        assert [each.offset for each in stretches] == sorted(each.offset for each in stretches)
        for each in stretches if receiver == rank else ():
            part = plan.parts[each.part]
            assert part.rank == sender
            assert 0 <= each.first < each.first + each.num_tokens <= part.num_tokens
            for row in range(each.num_tokens):
                assert each.offset + row not in found
                found[each.offset + row] = part.offset + each.first + row
    return dict(sorted(found.items()))


@pytest.mark.parametrize("replica", [0, 5])
def test_without_context_parallelism_a_part_goes_where_its_replica_is(replica: int) -> None:
    items = [VisionItem(Grid(1, 4, 4), replica, 0), VisionItem(Grid(1, 2, 2), replica, 0)]
    plan = plan_vision(items, 8, COST, max_patches_per_chunk=1, split=False)
    (found,) = transfers_of(plan, Receiver(replica, replica, 1))
    assert of_whole_replica(replica, 0)[0].rank == replica
    stretches = {each for rows in found.values() for each in rows}
    assert stretches == {Stretch(0, 0, 4, 0), Stretch(1, 0, 1, 4)}
    assert {receiver for _, receiver in found} == {replica}


def test_runs_follow_the_placeholders() -> None:
    # The drawing at the top of transfers.py.
    starts, ranks = np.array([0, 4, 11, 14]), np.array([6, 7, 6, 7])
    placeholders = np.array([2, 3, 4, 7, 8, 9, 10, 11, 12])
    assert runs_of(placeholders, starts, ranks) == (
        RowRun(6, 0, 2, 0),
        RowRun(7, 2, 7, 0),
        RowRun(6, 7, 9, 2),
    )
    assert runs_of(placeholders[:0], starts, ranks) == ()
    assert runs_of(np.array([0, 13]), starts, ranks) == (RowRun(6, 0, 2, 0),)


@pytest.mark.parametrize("seed", range(20))
def test_runs_hold_each_placeholder_once_in_order(seed: int) -> None:
    draw = random.Random(seed)
    cuts = sorted(draw.sample(range(1, 64), draw.randint(0, 12)))
    starts, ranks = np.array([0, *cuts]), np.array([draw.randrange(3) for _ in range(len(cuts) + 1)])
    placeholders = np.array(sorted(draw.sample(range(64), draw.randint(1, 64))))
    holder = np.repeat(ranks, np.diff([*starts, 64]))[placeholders]
    runs = runs_of(placeholders, starts, ranks)
    rows = [(run.rank, row) for run in runs for row in range(run.start, run.stop)]
    assert rows == list(zip(holder.tolist(), range(len(placeholders)), strict=True))
    for rank in range(3):
        offsets = [run.offset + n for run in runs if run.rank == rank for n in range(run.stop - run.start)]
        assert offsets == list(range(int((holder == rank).sum())))
