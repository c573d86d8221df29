"""The order of tasks: each once an epoch, sources by their weights, the same wherever one looks."""

import pytest

from k25_train.config.environment import EnvironmentConfig, TaskSourceConfig
from k25_train.environments.base import Task
from k25_train.errors import ConfigError, RolloutError
from k25_train.rl.tasks import TaskOrder
from tests.helpers.rollout_sections import sandbox_section


def order(seed: int = 3, epochs: int = 2, **sources: tuple[int, float]) -> TaskOrder:
    made = {
        name: TaskSourceConfig(family="sums", num_tasks=tasks, weight=weight, num_heldout=5)
        for name, (tasks, weight) in sources.items()
    }
    return TaskOrder(EnvironmentConfig(tasks=made, epochs=epochs, sandbox=sandbox_section()), seed)


def test_every_task_comes_once_an_epoch_in_another_order() -> None:
    tasks = order(sums=(30, 1.0))
    epochs = [[tasks.draw(30 * epoch + place) for place in range(30)] for epoch in range(2)]
    for number, epoch in enumerate(epochs):
        assert len({draw.task.key for draw in epoch}) == 30
        assert {draw.epoch for draw in epoch} == {number}
    keys = [[draw.task.key for draw in epoch] for epoch in epochs]
    assert keys[0] != keys[1] and sorted(keys[0]) == sorted(keys[1])
    with pytest.raises(RolloutError, match=r"all 30 tasks of sums were used 2 times"):
        tasks.draw(60)


def test_a_sample_is_spread_over_both_parts_of_every_source() -> None:
    keys = [task.key for task in order(a=(100, 1.0), b=(3, 1.0), never=(10, 0.0)).sampled(4)]
    numbers = [int(key.rpartition("/")[2]) for key in keys]
    assert numbers == [0, 25, 50, 75, 0, 2, 4, 0, 1, 2, 0, 2, 4]


def test_tasks_with_rubrics_have_the_judge_of_both_wherever_they_come_from() -> None:
    source = TaskSourceConfig(family="sums", num_tasks=4, num_heldout=2, rubrics={"helpfulness": 0.2})
    tasks = TaskOrder(EnvironmentConfig(tasks={"mine": source}, epochs=1, sandbox=sandbox_section()), 3)
    found = [
        tasks.draw(0).task, tasks.numbered(1), *tasks.heldout(2), *tasks.probes(1), *tasks.sampled(2)
    ]  # fmt: skip
    assert {task.judge for task in found} == {"answer with the rubrics of mine"}


def test_an_agent_gets_tasks_that_are_judged_by_the_answer_alone() -> None:
    def drawn(family: str) -> Task:
        source = TaskSourceConfig(family=family, num_tasks=4, num_heldout=2, agent=["mini"])
        section = EnvironmentConfig(tasks={"mine": source}, epochs=1, sandbox=sandbox_section())
        return TaskOrder(section, 3).draw(0).task

    assert drawn("sums").agent == ("mini",) and drawn("sums").needs_sandbox
    with pytest.raises(
        ConfigError, match=r"environment\.tasks\.mine\.agent: tasks of chores .* environment tools"
    ):
        drawn("chores")


def test_seeds_change_the_order_and_nothing_else() -> None:
    first, same, other = (order(seed, sums=(30, 1.0)) for seed in (1, 1, 2))
    drawn = [[each.draw(place).task.key for place in range(30)] for each in (first, same, other)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_sources_come_by_their_weights() -> None:
    tasks = order(a=(10_000, 3.0), b=(10_000, 1.0), never=(10, 0.0))
    places = [tasks._place(number) for number in range(4000)]
    names = [source.name for source, _ in places]
    assert names.count("a") == 3000 and names.count("b") == 1000
    for name in ("a", "b"):
        assert [place for source, place in places if source.name == name] == [*range(names.count(name))]


def test_a_run_that_needs_more_tasks_than_it_may_use_is_refused() -> None:
    tasks = order(sums=(10, 1.0))
    tasks.check_enough(20)
    with pytest.raises(ConfigError, match=r"environment.epochs=2: the run needs 21 tasks of sums"):
        tasks.check_enough(21)


def test_seeds_of_responses_differ_by_everything_and_fit_an_integer() -> None:
    tasks = order(sums=(10, 1.0))
    seeds = {
        tasks.seed_of(task, epoch, sample, purpose)
        for task in ("a", "b")
        for epoch in (0, 1)
        for sample in (0, 1)
        for purpose in ("train", "heldout")
    }
    assert len(seeds) == 16 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_billion_tasks_are_looked_up_at_once() -> None:
    tasks = order(sums=(10**9, 1.0))
    assert tasks.draw(10**9 + 17).epoch == 1


def test_heldout_tasks_are_no_training_tasks() -> None:
    tasks = order(sums=(50, 1.0))
    held = {repr(task.messages) for task in tasks.heldout(99)}
    assert len(tasks.heldout(99)) == 5 and len(tasks.heldout(2)) == 2
    assert not held & {repr(tasks.draw(number).task.messages) for number in range(50)}


def test_problems_number_the_tasks_that_share_one() -> None:
    tasks = order(a=(6, 1.0), b=(4, 1.0))
    problems = tasks.problems()
    assert sorted(number for numbers in problems.values() for number in numbers) == [*range(10)]
    for problem, numbers in problems.items():
        assert {tasks.numbered(number).problem for number in numbers} == {problem}
