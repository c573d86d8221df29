"""The bench of random faults notices a product that is wrong, and passes one that is right."""

import random
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.faults import processes
from tests.helpers.faults.inventory import sound_steps
from tests.helpers.faults.kinds import KINDS
from tests.helpers.faults.moments import Moment
from tests.helpers.faults.plans import DONE, KILLED, Plan
from tests.helpers.faults.scenes import NUM_STEPS, Reference, World
from tests.helpers.faults.trial import run_trial

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def world(data: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    (folder / "data").symlink_to(data)
    return World(folder)


@pytest.fixture(scope="module")
def reference(world: World) -> Reference:
    return world.reference("alone")


def kill_at(name: str, count: int = 1, **more: object) -> Plan:
    """SIGKILL at the first moment of this name, in a run that was cut off before its last two steps."""
    return Plan(
        kind="kill",
        text=name,
        layout="alone",
        started_at=NUM_STEPS - 2,
        ends=frozenset({KILLED}),
        moment=Moment(rank=0, name=name, count=count),
        strike=partial(processes.send, number=signal.SIGKILL, ranks=[0], pause_s=0),
        **more,  # type: ignore[arg-type]
    )


def test_a_run_that_is_killed_while_it_publishes_loses_nothing(world: World, tmp_path: Path) -> None:
    verdict = run_trial(world, kill_at("file rename", count=2), tmp_path / "trial")

    assert verdict.problems == ()
    assert verdict.way == KILLED


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_every_kind(kind: str, world: World, tmp_path: Path) -> None:
    for seed in (1, 2):
        plan = KINDS[kind].draw(random.Random(seed), world)
        verdict = run_trial(world, plan, tmp_path / f"trial_{seed}")
        assert verdict.problems == (), f"{plan.text}; {plan.layout}, from step {plan.started_at}"


def keep_one_less() -> None:
    from k25_train.checkpoint import folders

    prune = folders.prune
    folders.prune = lambda root, keep, keep_every: prune(root, keep - 1, keep_every)


def other_figures() -> None:
    from k25_train.training import trainer

    row = trainer.metrics_row
    trainer.metrics_row = lambda *arguments, **named: row(*arguments, **named) | {"grad_norm": 1.0}


PLANTED = {keep_one_less: "sound checkpoints are lost: [2]", other_figures: "the row of step 4 differs"}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_product_that_is_wrong_is_noticed(plant: object, world: World, tmp_path: Path) -> None:
    calm = replace(kill_at("never", plant=plant), ends=frozenset({DONE}))

    verdict = run_trial(world, calm, tmp_path / "trial")

    assert [problem for problem in verdict.problems if PLANTED[plant] in problem], verdict.problems


def test_only_whole_and_equal_checkpoints_are_sound(reference: Reference, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference.folder, run)
    assert sound_steps(run, reference.folder) == set(range(1, NUM_STEPS + 1))

    for step, change in enumerate((remove, cut, flip), start=1):
        change(run / f"checkpoints/step_{step}/rank_00000_0.safetensors")

    assert sound_steps(run, reference.folder) == {4}


def remove(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
