"""Order of passes and when they run: bubbles as the literature counts them, work in between, deadlocks."""

import random
import time
from dataclasses import dataclass
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline.micro_batches import micro_batch_group_size
from parallel.pipeline.schedule import Pass, schedule_of
from parallel.pipeline.simulator import ScheduleError, simulate
from parallel.pipeline.timeline import ChunkSeconds, Slot, Timeline, Work


def schedules(pp: int, vpp: int, num_micro_batches: int, overlaps: bool = False) -> list[list[Pass]]:
    group_size = micro_batch_group_size(num_micro_batches, pp) if vpp > 1 else 1
    return [
        schedule_of(pp, vpp, num_micro_batches, group_size, stage, overlaps=overlaps) for stage in range(pp)
    ]


def even(num_chunks: int) -> ChunkSeconds:
    """Forward takes a second, backward two."""
    return ChunkSeconds(forward_s=(1.0,) * num_chunks, backward_s=(2.0,) * num_chunks)


def busy_s(timeline: Timeline, rank: int) -> float:
    return timeline.makespan_s - sum(slot.seconds for slot in timeline.slots(rank))


SIZES = st.integers(1, 5).flatmap(
    lambda pp: st.tuples(
        st.just(pp), st.integers(1, 3) if pp > 1 else st.just(1), st.integers(pp, 3 * pp + 2)
    )
)


@given(sizes=SIZES, overlaps=st.booleans())
def test_every_rank_runs_every_pass_once_and_backward_after_forward(
    sizes: tuple[int, int, int], overlaps: bool
) -> None:
    pp, vpp, num_micro_batches = sizes
    for passes in schedules(pp, vpp, num_micro_batches, overlaps):
        places = {each[:3]: position for position, each in enumerate(passes)}
        assert len(places) == len(passes) == 2 * vpp * num_micro_batches
        for is_forward, vp_stage, number in places:
            if is_forward:
                assert places[True, vp_stage, number] < places[False, vp_stage, number]


@given(sizes=SIZES, overlaps=st.booleans())
def test_passes_wait_for_their_inputs_and_for_one_another(
    sizes: tuple[int, int, int], overlaps: bool
) -> None:
    pp, vpp, num_micro_batches = sizes
    lists = schedules(pp, vpp, num_micro_batches, overlaps)
    run = simulate(lists, even(pp * vpp), transfer_s=0.25)
    ends = {
        (each.is_forward, each.vp_stage * pp + stage, each.micro_batch): run.ends_s[stage][position]
        for stage, passes in enumerate(lists)
        for position, each in enumerate(passes)
    }
    for stage, passes in enumerate(lists):
        free_s = 0.0
        for position, each in enumerate(passes):
            start_s, chunk = run.starts_s[stage][position], each.vp_stage * pp + stage
            assert start_s >= free_s
            before = (each.is_forward, chunk - 1 if each.is_forward else chunk + 1, each.micro_batch)
            if before in ends:
                assert start_s >= ends[before] + 0.25
            # Only the two that run as one end together.
            free_s = run.ends_s[stage][position] if not each.overlaps_next else start_s
    assert busy_s(run, 0) == pytest.approx(3 * vpp * num_micro_batches)


@pytest.mark.parametrize(("pp", "vpp"), [(2, 1), (4, 1), (4, 2), (8, 4), (16, 2)])
@pytest.mark.parametrize("overlaps", [False, True])
def test_the_bubble_is_a_pass_both_ways_for_each_further_rank(pp: int, vpp: int, overlaps: bool) -> None:
    """Narayanan et al., arXiv 2104.04473: (pp - 1) (forward + backward) of one chunk."""
    run = simulate(schedules(pp, vpp, 4 * pp, overlaps), even(pp * vpp))
    assert run.makespan_s == 3 * vpp * 4 * pp + 3 * (pp - 1)


def test_slots_of_two_ranks() -> None:
    run = simulate(schedules(2, 1, 2), even(2))
    assert run.slots(0) == [Slot(2, 2.0, 4.0), Slot(3, 6.0, 7.0)]
    assert run.slots(1) == [Slot(0, 0.0, 1.0), Slot(4, 7.0, 9.0)]
    assert run.feature_deadlines_s() == [0.0, 1.0]
    assert run.gradient_times_s() == [6.0, 9.0]


def test_the_first_chunk_waits_for_features_and_their_backward_for_it() -> None:
    lists = schedules(2, 1, 2)
    before = {
        (1, 0): [Work(True, 0, 1, 3.0)],
        (0, 0): [Work(True, 0, 0, 0.5)],
        (1, 4): [Work(False, 0, 0, 4.0)],
    }
    run = simulate(lists, even(2), before=before, exchange_s=0.5)
    assert run.starts_s[0][:2] == [1.0, 3.5]
    assert run.work_starts_s[1, 0] == [0.0]
    first_backward_s = run.gradient_times_s()[0]
    assert run.work_starts_s[1, 4] == [max(run.ends_s[1][3], first_backward_s + 0.5)]
    assert run.makespan_s == max(run.gradient_times_s()[1], run.work_starts_s[1, 4][0] + 4.0)


def test_replicas_meet_in_the_work_of_the_tower() -> None:
    """Rank 1 is the first stage's of replica 1: it encodes what replica 0 waits for."""
    run = simulate(schedules(2, 1, 2), even(2), before={(1, 0): [Work(True, 0, 0, 5.0)]}, num_replicas=2)
    assert [run.starts_s[rank][0] for rank in range(4)] == [5.0, 5.0, 6.0, 6.0]


def test_work_moves_passes_only_beyond_the_idle_time() -> None:
    lists = schedules(4, 2, 8)
    text = simulate(lists, even(8))
    for stage in range(4):
        for slot in text.slots(stage):
            place = (stage, slot.position)
            filled = simulate(lists, even(8), before={place: [Work(True, 0, 99, slot.seconds)]})
            assert filled.starts_s == text.starts_s
            assert filled.makespan_s == text.makespan_s
            overfilled = simulate(lists, even(8), before={place: [Work(True, 0, 99, slot.seconds + 1)]})
            starts_s = [*overfilled.starts_s[stage], overfilled.rank_ends_s[stage]]
            assert starts_s[slot.position] == slot.end_s + 1


def test_work_that_waits_for_itself_is_reported() -> None:
    lists = schedules(2, 1, 2)
    with pytest.raises(ScheduleError, match=r"rank 0 waits at position 0 .*Work.is_forward=False"):
        simulate(lists, even(2), before={(0, 0): [Work(False, 0, 0, 1.0)]})
    with pytest.raises(ScheduleError, match=r"rank 0 waits at position 0 .*Pass"):
        simulate(lists, even(2), before={(1, 4): [Work(True, 0, 0, 1.0)]})


def test_work_at_no_place_is_refused() -> None:
    lists = schedules(2, 2, 4, overlaps=True)
    overlapped = next(position for position, each in enumerate(lists[0]) if each.overlaps_next)
    for rank, position in ((0, len(lists[0]) + 1), (2, 0), (-1, 0), (0, -1)):
        with pytest.raises(ScheduleError, match="there is no such position"):
            simulate(lists, even(4), before={(rank, position): [Work(True, 0, 0, 1.0)]})
    with pytest.raises(ScheduleError, match="overlaps the one before"):
        simulate(lists, even(4), before={(0, overlapped + 1): [Work(True, 0, 0, 1.0)]})


def test_the_largest_pipeline_is_simulated_in_a_second() -> None:
    lists = schedules(16, 2, 1024, overlaps=True)
    started = time.process_time()
    simulate(lists, even(32))
    assert time.process_time() - started < 1.0


@dataclass(frozen=True)
class Table:
    """`Durations` in which every pass and pair has its own."""

    num_chunks: int
    known: dict[tuple[int | None, int | None], tuple[float, float]]

    def alone_s(self, chunk: int, *, is_forward: bool) -> float:
        return self.known[(chunk, None) if is_forward else (None, chunk)][0]

    def pair_s(self, forward_chunk: int, backward_chunk: int) -> float:
        return self.known[forward_chunk, backward_chunk][0]

    def message_s(self, forward_chunk: int | None, backward_chunk: int | None) -> float:
        return self.known[forward_chunk, backward_chunk][1]

    @classmethod
    def drawn(cls, num_chunks: int, seed: int) -> "Table":
        generator, chunks = random.Random(seed), [None, *range(num_chunks)]
        keys = product(chunks, chunks)
        return cls(num_chunks, {key: (generator.uniform(0.5, 3), generator.choice([0, 0.4])) for key in keys})


def ends_by_relaxation(lists: list[list[Pass]], seconds: Table, transfer_s: float) -> list[list[float]]:
    """The same by the rules alone: every pass begins as early as it can, tried until nothing moves."""
    pp, last = len(lists), seconds.num_chunks - 1
    ends_s = [[0.0] * len(passes) for passes in lists]
    units = [
        (stage, [at, at + 1][: 1 + passes[at].overlaps_next])
        for stage, passes in enumerate(lists)
        for at in range(len(passes))
        if not (at and passes[at - 1].overlaps_next)
    ]
    while True:
        arrived, moved = arrivals(lists, ends_s, seconds, transfer_s), False
        for stage, places in units:
            start_s = ends_s[stage][places[0] - 1] if places[0] else 0.0
            for each in (lists[stage][at] for at in places):
                chunk = each.vp_stage * pp + stage
                before = chunk - 1 if each.is_forward else chunk + 1
                if not each.is_forward and chunk == last:
                    start_s = max(start_s, arrived[True, last, each.micro_batch, True])
                elif before >= 0:
                    start_s = max(start_s, arrived[each.is_forward, before, each.micro_batch, False])
            end_s = start_s + seconds.known[key_of(lists, stage, places[0])][0]
            moved = moved or end_s != ends_s[stage][places[0]]
            for at in places:
                ends_s[stage][at] = end_s
        if not moved:
            return ends_s


def key_of(lists: list[list[Pass]], stage: int, at: int) -> tuple[int | None, int | None]:
    """(forward chunk, backward chunk) of what runs at a position."""
    passes, pp = lists[stage], len(lists)
    first = at - 1 if at and passes[at - 1].overlaps_next else at
    together = passes[first : first + 1 + passes[first].overlaps_next]
    found = {each.is_forward: each.vp_stage * pp + stage for each in together}
    return found.get(True), found.get(False)


def arrivals(
    lists: list[list[Pass]], ends_s: list[list[float]], seconds: Table, transfer_s: float
) -> dict[tuple[bool, int, int, bool], float]:
    """(direction, chunk, micro-batch, whether on its own rank) -> when the result of a pass is there."""
    found = {}
    for stage, passes in enumerate(lists):
        for at, each in enumerate(passes):
            what = each.is_forward, each.vp_stage * len(lists) + stage, each.micro_batch
            found[*what, True] = ends_s[stage][at]
            sent_s = seconds.known[key_of(lists, stage, at)][1] + transfer_s
            found[*what, False] = ends_s[stage][at] + sent_s
    return found


@given(sizes=SIZES, overlaps=st.booleans(), seed=st.integers(0, 99), transfer_s=st.sampled_from([0.0, 0.25]))
@settings(max_examples=40)
def test_passes_run_when_the_rules_alone_say(
    sizes: tuple[int, int, int], overlaps: bool, seed: int, transfer_s: float
) -> None:
    pp, vpp, num_micro_batches = sizes
    lists, seconds = schedules(pp, vpp, num_micro_batches, overlaps), Table.drawn(pp * vpp, seed)
    run = simulate(lists, seconds, transfer_s=transfer_s)
    for found, expected in zip(run.ends_s, ends_by_relaxation(lists, seconds, transfer_s), strict=True):
        assert found == pytest.approx(expected)
