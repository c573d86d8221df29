"""The simulation of tasks on shared resources: what holds for any tasks, and cases computed by hand."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.plan.time.lanes import LEAST_ROOM, Resource, Run, Task, fair_rates, run_tasks

SHARES = st.dictionaries(st.sampled_from([*Resource]), st.floats(0.01, 1.0), max_size=3)
HELD = st.dictionaries(st.just(Resource.sms), st.floats(0.01, 0.3), max_size=1)


@st.composite
def task_lists(draw: st.DrawFn) -> list[Task]:
    """Tasks of a few streams, after any of those before."""
    tasks: list[Task] = []
    for position in range(draw(st.integers(1, 12))):
        after = draw(st.sets(st.integers(0, position - 1), max_size=2)) if position else set()
        stream = draw(st.sampled_from("abcd"))
        seconds = draw(st.one_of(st.just(0.0), st.floats(1e-3, 10.0)))
        tasks.append(Task(stream, seconds, draw(SHARES), draw(HELD), tuple(sorted(after))))
    return tasks


def critical_path_s(tasks: list[Task]) -> float:
    """How long tasks take if nothing is shared: along streams and what they are after."""
    ends: list[float] = []
    last: dict[str, float] = {}
    for task in tasks:
        start = max([last.get(task.stream, 0.0), *(ends[before] for before in task.after)])
        ends.append(start + task.seconds)
        last[task.stream] = ends[-1]
    return max(ends)


@settings(max_examples=60, deadline=None)
@given(task_lists())
def test_all_work_is_done_in_order_and_no_resource_is_used_twice(tasks: list[Task]) -> None:
    run = run_tasks(tasks)
    # 1. Each task gets as much as it takes, in one piece of time.
    for position, task in enumerate(tasks):
        done = sum(span.seconds * rate for span in run.spans for at, rate in span.running if at == position)
        assert done == pytest.approx(task.seconds, abs=1e-9)
        assert all(run.starts_s[position] >= run.ends_s[before] - 1e-9 for before in task.after)
    of_stream: dict[str, float] = {}
    for position, task in enumerate(tasks):
        assert run.starts_s[position] >= of_stream.get(task.stream, 0.0) - 1e-9
        of_stream[task.stream] = run.ends_s[position]
    # 2. Nothing is used more than there is of it.
    for span in run.spans:
        running = [(tasks[at], rate) for at, rate in span.running]
        for resource in Resource:
            held = sum(task.held.get(resource, 0.0) for task, _ in running)
            used = sum(rate * task.shares.get(resource, 0.0) for task, rate in running)
            assert used <= max(1 - held, LEAST_ROOM) + 1e-9
    # 3. Times have no gaps.
    assert sum(span.seconds for span in run.spans) == pytest.approx(run.makespan_s, abs=1e-9)
    # 4. It takes as long as the longest chain and as each resource at least; on one stream, the sum.
    assert run.makespan_s >= critical_path_s(tasks) - 1e-9
    for resource in Resource:
        needed = sum(task.seconds * task.shares.get(resource, 0.0) for task in tasks)
        assert run.used_s(resource) == pytest.approx(needed, abs=1e-9)
        assert run.makespan_s >= needed - 1e-9
    alone = run_tasks([replace(task, stream="a", held={}) for task in tasks])
    assert alone.makespan_s == pytest.approx(sum(task.seconds for task in tasks), abs=1e-9)


def run_two(first: Task, second: Task) -> Run:
    return run_tasks([first, second])


def test_what_an_exchange_holds_slows_computation_for_as_long_as_it_runs() -> None:
    exchange = Task("exchanges", 1.0, {Resource.network: 1.0}, {Resource.sms: 0.2})
    kernels = Task("compute", 2.0, {Resource.sms: 1.0})
    # 0.8 of the work in the exchange's second, the rest at full rate.
    assert run_two(kernels, exchange).makespan_s == pytest.approx(1.0 + 1.2)
    # What needs no more than the rest is not slowed down.
    moving = replace(kernels, shares={Resource.sms: 0.5})
    assert run_two(moving, exchange).makespan_s == pytest.approx(2.0)


def test_two_on_one_link_share_it_evenly_and_take_no_longer_than_the_link() -> None:
    first = Task("a", 1.0, {Resource.network: 1.0})
    second = Task("b", 3.0, {Resource.network: 1.0})
    run = run_two(first, second)
    assert run.ends_s == pytest.approx([2.0, 4.0])


def test_who_needs_little_gets_it_and_the_rest_goes_to_the_others() -> None:
    tasks = [
        Task("a", 1.0, {Resource.to_host: 0.2}),
        Task("b", 1.0, {Resource.to_host: 1.0}),
        Task("c", 1.0, {Resource.memory: 0.7}),
    ]
    rates = fair_rates(tasks, [0, 1, 2])
    assert rates[2] == 1.0
    # Rates grow alike until the link is full.
    assert rates[0] == rates[1] == pytest.approx(1 / 1.2)


def test_a_task_cannot_wait_for_a_later_one() -> None:
    with pytest.raises(ValueError, match="task 0 is after"):
        run_tasks([Task("a", 1.0, after=(1,)), Task("b", 1.0)])
