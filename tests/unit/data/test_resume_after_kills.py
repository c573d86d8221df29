"""Killed at random moments, a job goes on in another layout with the same samples and bytes."""

import json
import random
from pathlib import Path

import pytest

from tests.helpers.data_job import Job, Layout, differences, run_with_kills
from tests.helpers.runs import layout, overrides
from tests.helpers.tiny_shards import write_tiny_shard_set

NUM_STEPS = 12
LAYOUTS = (
    Layout(2, ("data.read_in=process", "data.prefetch_steps=2", "train.micro_batch_size=2")),
    Layout(4, ("data.read_in=process", "data.prefetch_steps=0", "train.micro_batch_size=1")),
    Layout(1, ("data.read_in=process", "data.prefetch_steps=3", "train.micro_batch_size=4")),
)
ALONE = Layout(1, ("data.read_in=thread", "data.prefetch_steps=0"))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Job]:
    """One that is killed three times, and one that is not."""
    root = tmp_path_factory.mktemp("jobs")
    data = write_tiny_shard_set(root / "set")
    common = overrides(data, root / "run", "dep.mode=coupled", *layout(), f"train.steps={NUM_STEPS}")
    whole = Job(root / "whole", tuple(common), NUM_STEPS, interval=NUM_STEPS)
    killed = Job(root / "killed", tuple(common), NUM_STEPS)
    whole.finish(0, ALONE)
    run_with_kills(killed, LAYOUTS, 3, random.Random(1))
    return killed, whole


def test_samples_and_bytes_are_those_of_an_undisturbed_job(jobs: tuple[Job, Job]) -> None:
    killed, whole = jobs
    assert len({attempt for step in range(1, NUM_STEPS + 1) for attempt in killed.attempts_of(step)}) > 1
    assert differences(killed, whole) == []
    record = whole.record(NUM_STEPS, 0)
    assert record is not None and len(record["ids"]) == len(record["sequences"]) == 8


def test_the_comparison_sees_another_sample_and_other_bytes(jobs: tuple[Job, Job], tmp_path: Path) -> None:
    _, whole = jobs
    for name, other in (("ids", [["text", [["text-0", 1, 2]]]] * 8), ("sequences", ["0"] * 8)):
        changed = Job(tmp_path / name, whole.arguments, NUM_STEPS)
        changed.records.mkdir(parents=True)
        for step in range(1, NUM_STEPS):
            record = whole.record(step, 0)
            assert record is not None
            content = {"of": 1, **record, **({name: other} if step == 7 else {})}
            (changed.records / f"0.{step}.0.json").write_text(json.dumps(content))
        assert differences(changed, whole) == [
            f"step 7, attempt 0: other {name}",
            f"step {NUM_STEPS}: no attempt has all of it",
        ]


def test_the_state_in_a_checkpoint_is_small(jobs: tuple[Job, Job]) -> None:
    sizes = [path.stat().st_size for path in jobs[0].checkpoints.glob("*/data_state.json")]
    assert sizes and max(sizes) < 4096
