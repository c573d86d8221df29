"""Which checkpoints go when old ones are pruned by hand."""

from collections.abc import Collection

from k25_train.checkpoint.commands.pruning import Condition, Found, decide

RUN = [
    *(Found(f"step_{step}", step, Condition.sound, "", 10, step // 10) for step in (30, 10, 20, 50, 40)),
    Found("step_45", 45, Condition.damaged, "a file is missing", 10),
    Found("step_60.unsound", 60, Condition.unsound, "loss is NaN", 10),
    Found("step_70.partial", 70, Condition.partial, "", 10),
]


def gone(keep: int, keep_every: int = 0, named: Collection[str] = ()) -> list[str]:
    return [each.found.name for each in decide(RUN, keep, keep_every, named) if each.goes]


def test_the_newest_sound_ones_stay() -> None:
    assert gone(2) == ["step_10", "step_20", "step_30", "step_70.partial"]
    assert gone(9) == ["step_70.partial"]


def test_milestones_stay() -> None:
    assert gone(1, keep_every=2) == ["step_10", "step_30", "step_70.partial"]


def test_what_is_not_sound_goes_if_it_is_named() -> None:
    assert gone(9, named=["step_45"]) == ["step_45", "step_70.partial"]
    assert gone(9, named=["step_60.unsound", "step_50"]) == ["step_60.unsound", "step_70.partial"]


def test_damaged_ones_do_not_count() -> None:
    found = [Found("step_1", 1, Condition.sound, "", 1), Found("step_2", 2, Condition.damaged, "x", 1)]
    assert not any(each.goes for each in decide(found, 1, 0, ()))


def test_every_decision_has_its_reason() -> None:
    assert [each.why for each in decide(RUN, 2, 2, ())] == [
        "older than the newest 2",
        "the run's number 2, a multiple of 2",
        "older than the newest 2",
        "number 2 of the newest 2",
        "damaged: goes if it is named with --also",
        "the newest",
        "unsound: goes if it is named with --also",
        "a save or a deletion was interrupted",
    ]
