"""The judge of random faults: each way in which a run may go wrong is a problem, and nothing else is."""

import os
import random
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.helpers.faults import clock, files
from tests.helpers.faults.kinds import KINDS
from tests.helpers.faults.moments import Moment, Watch
from tests.helpers.faults.plans import DONE, KILLED, NAMED, STOPPED, Plan
from tests.helpers.faults.scenes import LAYOUTS, NUM_STEPS, Scene, World
from tests.helpers.faults.small_jobs import Outcome
from tests.helpers.faults.trial import differences, lost, problems_of, way_of

CALM = Plan(kind="none", text="nothing", layout="alone", started_at=0, ends=frozenset({DONE}))


def ended(*statuses: int, output: str = "", **more: Any) -> Outcome:
    fine = {"has_reached": True, "is_hung": False, "leftovers": (), "counts": {}}
    return Outcome(statuses=statuses, output=output, **(fine | more))


@pytest.mark.parametrize(
    ("before", "after", "missing"),
    [
        ({1, 2}, {1, 2}, []),
        # The oldest goes when there is a newer one.
        ({1, 2}, {2, 3}, []),
        ({1, 2}, {3, 4}, []),
        ({2}, {2, 3}, []),
        (set(), set(), []),
        ({1, 2}, {2}, [1]),
        ({1, 2}, {3}, [2]),
        ({1, 2}, set(), [1, 2]),
    ],
)
def test_the_newest_sound_checkpoints_must_survive(
    before: set[int], after: set[int], missing: list[int]
) -> None:
    found = lost(before, after, num_kept=2)
    assert [f"lost: {missing};" in text for text in found] == [True] * bool(missing)


@pytest.mark.parametrize(
    ("outcome", "way"),
    [
        (ended(0, 0), DONE),
        (
            ended(0, output="SIGTERM: checkpoint of step 2 saved; the same command goes on from there"),
            STOPPED,
        ),
        (ended(2), NAMED),
        (ended(2, -15), NAMED),
        (ended(-9), KILLED),
        (ended(130), KILLED),
        (ended(1), "status (1,)"),
    ],
)
def test_ways_to_end(outcome: Outcome, way: str) -> None:
    assert way_of(outcome) == way


TRACEBACK = "Traceback (most recent call last):\n  File ...\nValueError: x"
WRONG = {
    "it hangs": ended(-9, is_hung=True),
    "processes are left: (77,)": ended(0, leftovers=(77,)),
    "it ended with: status (1,)": ended(1, output=TRACEBACK),
    "a traceback: ValueError: x": ended(2, output=TRACEBACK),
    "it ended with: stopped": ended(0, output="the same command goes on from there"),
    "it ended with: killed": ended(-6, output="terminate called"),
}


@pytest.mark.parametrize("problem", WRONG)
def test_a_wrong_end_is_a_problem(problem: str) -> None:
    assert [text for text in problems_of(WRONG[problem], CALM) if text.startswith(problem)]


def test_a_right_end_is_none() -> None:
    assert problems_of(ended(0, 0), CALM) == []
    killed = replace(CALM, ends=frozenset({KILLED}))
    # Who loses a peer cannot know why.
    assert problems_of(ended(-9, 1, output=TRACEBACK), killed) == []
    assert problems_of(ended(-15, 1, output=TRACEBACK), killed) != []


class CalmWorld:
    """A world whose references are not trained."""

    def reference(self, _: str) -> SimpleNamespace:
        return SimpleNamespace(counts={"phase optimizer": NUM_STEPS, "file rename": 9, "phase forward": 40})


@pytest.mark.parametrize("kind", KINDS)
def test_every_seed_gives_a_fault_and_the_same_one_again(kind: str) -> None:
    world = cast(World, CalmWorld())
    for seed in range(60):
        plan, again = (KINDS[kind].draw(random.Random(seed), world) for _ in range(2))
        assert plan.kind == kind
        assert (plan.text, plan.layout, plan.moment) == (again.text, again.layout, again.moment)
        assert plan.moment is None or plan.moment.rank < LAYOUTS[plan.layout][0]
        assert 0 <= plan.started_at < NUM_STEPS


def test_a_moment_comes_once_and_only_for_what_it_names(tmp_path: Path) -> None:
    reached: list[Mapping[str, int]] = []
    watch = Watch(Moment(rank=0, name="b", count=2), lambda: reached.append(dict(watch.counts)))
    for name in ("a", "b", "a", "b", "b"):
        watch.happened(name)
    assert reached == [{"a": 2, "b": 2}]


def test_files_of_the_run_are_seen_and_no_others(tmp_path: Path) -> None:
    watch = Watch(None, lambda: None)
    watch.install(tmp_path / "run")
    (tmp_path / "other").write_text("x")
    assert not watch.counts
    (tmp_path / "run").mkdir()
    (tmp_path / "run/a").write_text("x")
    (tmp_path / "run/a").read_text()
    (tmp_path / "run/a").rename(tmp_path / "run/b")
    (tmp_path / "run/b").unlink()
    assert watch.counts == {"file make": 1, "file write": 1, "file rename": 1, "file remove": 1}


@pytest.mark.parametrize("damage", files.DAMAGES)
def test_damage_is_done_and_can_be_undone(damage: str, tmp_path: Path) -> None:
    scene = Scene(world=World(tmp_path), folder=tmp_path, layout="alone", started_at=0)
    (tmp_path / "run").mkdir()
    file = tmp_path / "run/metrics.jsonl"
    file.write_bytes(b"some rows\n" * 9)
    files.damage_one(scene, folder="run", pattern="*.jsonl", damage=damage, seed=1)
    assert not file.is_file() or file.read_bytes() != b"some rows\n" * 9
    files.restore(scene, folder="run")
    assert file.read_bytes() == b"some rows\n" * 9


def test_a_row_that_is_missing_or_differs_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"step": step, "loss": 8.0 - step, "grad_norm": 1.0} for step in range(NUM_STEPS + 1)]
    monkeypatch.setattr(Scene, "reference", SimpleNamespace(rows=rows, folder=tmp_path))
    monkeypatch.setattr("tests.helpers.faults.trial.sound_steps", lambda *_: {NUM_STEPS})
    scene = Scene(world=World(tmp_path), folder=tmp_path, layout="alone", started_at=0)
    scene.checkpoints.mkdir(parents=True)

    def problems_with(lines: list[str], plan: Plan = CALM, output: str = "") -> list[str]:
        (scene.run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return differences(scene, plan, output)

    lines = [f'{{"step": {row["step"]}, "loss": {row["loss"]}, "grad_norm": 1.0}}' for row in rows]
    assert problems_with(lines) == []
    assert problems_with(lines[:-1]) == [f"the row of step {NUM_STEPS} is missing"]
    assert problems_with(lines[:-1], output="metrics.jsonl: cannot be written") == []
    wrong = [*lines[:-1], lines[-1].replace("1.0}", "1.0000001}")]
    assert [text.partition(":")[0] for text in problems_with(wrong)] == [
        f"the row of step {NUM_STEPS} differs"
    ]
    assert problems_with(wrong, replace(CALM, end_layout="two stages")) == []
    (scene.checkpoints / "step_3.partial").mkdir()
    assert problems_with(lines) == ["left behind: step_3.partial"]


def test_the_time_of_day_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", time.time)
    before, monotonic = time.time(), time.monotonic()
    clock.shift(-7200)
    assert before - time.time() > 7000
    assert time.monotonic() >= monotonic
    assert "LD_PRELOAD" not in os.environ or "clock" in os.environ["LD_PRELOAD"]
