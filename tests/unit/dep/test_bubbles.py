"""Plans of the tower's work between passes: complete, kept by simulated steps, never worse than upfront."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.dep.bubbles import (
    BubblePlan,
    TimedItem,
    order_costly_to_middle,
    plan_bubbles,
    plan_upfront,
    work_of,
)
from parallel.pipeline.micro_batches import micro_batch_group_size
from parallel.pipeline.schedule import schedule_of
from parallel.pipeline.simulator import simulate
from parallel.pipeline.timeline import ChunkSeconds, Timeline


def pipeline(
    pp: int,
    vpp: int,
    num_micro_batches: int,
    forward_s: tuple[float, ...] | None = None,
    overlaps: bool = False,
) -> tuple[Timeline, ChunkSeconds]:
    """Without the tower; one second per forward pass by default, backward twice that."""
    group_size = micro_batch_group_size(num_micro_batches, pp) if vpp > 1 else 1
    lists = [
        schedule_of(pp, vpp, num_micro_batches, group_size, stage, overlaps=overlaps) for stage in range(pp)
    ]
    forward_s = forward_s or (1.0,) * (pp * vpp)
    seconds = ChunkSeconds(forward_s=forward_s, backward_s=tuple(2 * each for each in forward_s))
    return simulate(lists, seconds), seconds


def play(
    text: Timeline,
    seconds: ChunkSeconds,
    items: list[TimedItem],
    plan: BubblePlan,
    num_replicas: int,
    num_steps: int = 1,
    exchange_s: float = 0.0,
) -> Timeline:
    return simulate(
        text.schedules,
        seconds,
        before=work_of(items, plan.placements, num_steps),
        exchange_s=exchange_s,
        num_replicas=num_replicas,
    )


def draw_items(seed: int, count: int, num_replicas: int, numbers: range, mean_s: float) -> list[TimedItem]:
    generator = random.Random(seed)
    items = []
    for _ in range(count):
        forward_s = generator.lognormvariate(0, 1) * mean_s
        item = TimedItem(
            generator.randrange(num_replicas), generator.choice(numbers), forward_s, 3 * forward_s
        )
        items.append(item)
    return items


@st.composite
def cases(draw: st.DrawFn) -> tuple[Timeline, ChunkSeconds, list[TimedItem], int, dict[str, float]]:
    pp = draw(st.integers(1, 4))
    vpp = draw(st.integers(1, 3)) if pp > 1 else 1
    num_micro_batches, num_replicas = pp + draw(st.integers(0, 9)), draw(st.integers(1, 3))
    forward_s = tuple(draw(st.lists(st.sampled_from((0.5, 1.0, 1.1)), min_size=pp * vpp, max_size=pp * vpp)))
    text, seconds = pipeline(pp, vpp, num_micro_batches, forward_s, draw(st.booleans()))
    count, mean_s = draw(st.integers(0, 40)), draw(st.sampled_from((0.01, 0.1, 1.0)))
    items = draw_items(draw(st.integers(0, 99)), count, num_replicas, range(num_micro_batches), mean_s)
    times = {name: draw(st.sampled_from((0.0, 0.25))) for name in ("exchange_s", "gather_s", "reduce_s")}
    return text, seconds, items, num_replicas, times


@given(case=cases(), num_steps=st.sampled_from((1, 5)))
def test_plans_are_complete_and_kept(
    case: tuple[Timeline, ChunkSeconds, list[TimedItem], int, dict[str, float]], num_steps: int
) -> None:
    text, seconds, items, num_replicas, times = case
    plan = plan_bubbles(text, items, num_replicas, num_steps=num_steps, **times)
    for placement in plan.placements:
        assert 0 <= placement.rank < num_replicas * len(text.schedules)
        for shares in (placement.forward, placement.backward):
            assert sum(steps for _, steps in shares) == num_steps
            assert list(shares) == sorted(shares)
    planned_s = plan.start_delay_s + text.makespan_s + plan.end_delay_s
    run = play(text, seconds, items, plan, num_replicas, num_steps, times["exchange_s"])
    assert run.makespan_s <= planned_s + 1e-9
    for place, works in work_of(items, plan.placements, num_steps).items():
        for work, start_s in zip(works, run.work_starts_s[place], strict=True):
            if not work.is_forward:
                assert start_s + work.seconds + times["reduce_s"] <= planned_s + 1e-9
    if plan.start_delay_s == plan.end_delay_s == 0:
        assert run.makespan_s == text.makespan_s
    upfront = plan_upfront(text, items, num_replicas)
    around_s = 2 * times["exchange_s"] + times["gather_s"] + times["reduce_s"] if items else 0.0
    assert planned_s <= upfront.start_delay_s + text.makespan_s + upfront.end_delay_s + around_s + 1e-9


@given(case=cases())
def test_upfront_is_kept_and_even(
    case: tuple[Timeline, ChunkSeconds, list[TimedItem], int, dict[str, float]],
) -> None:
    text, seconds, items, num_replicas, _ = case
    plan = plan_upfront(text, items, num_replicas)
    run = play(text, seconds, items, plan, num_replicas)
    assert run.makespan_s <= plan.start_delay_s + text.makespan_s + plan.end_delay_s + 1e-9
    num_ranks = num_replicas * len(text.schedules)
    mean_s = sum(item.backward_s for item in items) / num_ranks
    assert plan.end_delay_s <= mean_s + max((item.backward_s for item in items), default=0.0)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("num_steps", [1, 27])
def test_what_fits_between_the_passes_costs_nothing(num_steps: int, overlaps: bool) -> None:
    text, seconds = pipeline(4, 2, 16, overlaps=overlaps)
    items = draw_items(1, 60, 4, range(2, 13), 0.05)
    plan = plan_bubbles(text, items, 4, num_steps=num_steps, exchange_s=0.01, gather_s=0.1, reduce_s=0.1)
    assert plan.start_delay_s == plan.end_delay_s == 0
    run = play(text, seconds, items, plan, 4, num_steps, exchange_s=0.01)
    assert run.makespan_s == text.makespan_s
    assert run.starts_s[::4] == text.starts_s


def test_only_the_first_and_last_items_put_the_step_off() -> None:
    text, _ = pipeline(4, 2, 16)
    first, last = TimedItem(0, 0, 0.5, 1.5), TimedItem(0, 15, 0.5, 1.5)
    assert plan_bubbles(text, [first], 2, exchange_s=0.1).start_delay_s == pytest.approx(0.6)
    assert plan_bubbles(text, [last], 2, exchange_s=0.1).end_delay_s == pytest.approx(1.6)
    both = plan_bubbles(text, [first, last], 2, exchange_s=0.1, gather_s=0.2, reduce_s=0.3)
    assert (both.start_delay_s, both.end_delay_s) == (pytest.approx(0.8), pytest.approx(1.9))
    # The second micro-batch starts a second after the first, in which other ranks wait for it.
    assert plan_bubbles(text, [first._replace(micro_batch=1)], 2, exchange_s=0.1).start_delay_s == 0


def test_the_first_items_are_spread_over_ranks() -> None:
    text, _ = pipeline(4, 2, 16)
    items = [TimedItem(0, 0, 0.5, 1.5)] * 8
    plan = plan_bubbles(text, items, 2, num_steps=3)
    assert (plan.start_delay_s, plan.end_delay_s) == (0.5, 0)
    assert sorted(placement.rank for placement in plan.placements) == list(range(8))


def test_steps_fill_idle_times_that_are_shorter_than_an_item() -> None:
    """The last chunk is slower, so all other ranks idle a little before most of their passes."""
    text, seconds = pipeline(2, 2, 64, (1.0, 1.0, 1.0, 1.2))
    items = draw_items(3, 40, 1, range(6, 58), 0.1)
    whole = plan_bubbles(text, items, 1)
    in_steps = plan_bubbles(text, items, 1, num_steps=27)
    assert whole.start_delay_s + whole.end_delay_s > 0
    assert in_steps.start_delay_s == in_steps.end_delay_s == 0
    assert play(text, seconds, items, in_steps, 1, 27).makespan_s == text.makespan_s


def test_equal_arguments_give_equal_plans() -> None:
    text, _ = pipeline(4, 2, 16)
    items = draw_items(2, 200, 4, range(16), 0.2)
    assert plan_bubbles(text, items, 4, num_steps=3) == plan_bubbles(text, items, 4, num_steps=3)


def test_no_items_no_work() -> None:
    text, _ = pipeline(2, 1, 4)
    for plan in (plan_bubbles(text, [], 2, gather_s=1.0), plan_upfront(text, [], 2)):
        assert plan == BubblePlan([], 0.0, 0.0)


@given(costs=st.lists(st.integers(0, 9), min_size=1))
def test_costly_micro_batches_are_in_the_middle_and_none_is_lost(costs: list[int]) -> None:
    order = order_costly_to_middle(costs)
    assert sorted(order) == list(range(len(costs)))
    ordered = [costs[number] for number in order]
    peak = ordered.index(max(ordered))
    assert ordered[:peak] == sorted(ordered[:peak])
    assert ordered[peak:] == sorted(ordered[peak:], reverse=True)
    assert ordered[-1] == min(costs)
