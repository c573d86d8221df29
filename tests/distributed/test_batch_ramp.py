"""A ramp of the global batch: trained as by one process, and resumed in its middle."""

from pathlib import Path

import pytest

from tests.helpers.interrupted_runs import ONE_RANK, assert_goes_on, cut_off, rows, short_run
from tests.helpers.parity import (
    EVERYTHING_OVERLAPS,
    TOLERANCE,
    Case,
    Parity,
    assert_first_loss_agrees,
    worst_difference,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import fit

pytestmark = pytest.mark.distributed

RAMP = (
    "train.batch_ramp.start=4 train.batch_ramp.increment=4 train.batch_ramp.length=4 train.steps=6 "
    "optim.warmup=1 optim.decay=2K"
).split()
"""Batches of 4, 4, 8, 8, 12 and 12 sequences; the rate falls by tokens."""
SMOKE = {"pp": 2, "vpp": 2, "ep": 2, "dp": 2}


@pytest.mark.parametrize(
    "more",
    [
        ("dep.schedule=bubbles", "activation.norm.input=offload", *EVERYTHING_OVERLAPS),
        pytest.param(("dep.mode=coupled",), marks=pytest.mark.slow),
    ],
)
def test_training_is_that_of_one_process(more: tuple[str, ...], parity: Parity) -> None:
    expected = parity.serial(8, 12, *RAMP)
    found = parity.losses(Case(SMOKE, 8, 12, (*RAMP, *more)))
    assert_first_loss_agrees(found, expected)
    assert worst_difference(found, expected) <= TOLERANCE


def test_a_run_goes_on_in_the_middle_of_a_ramp(data: Path, tmp_path: Path) -> None:
    """With six steps of 2 sequences, three of 4 and one of 6, and a checkpoint after five."""
    ramp = ("train.global_batch_size=6", "train.batch_ramp.start=2", "train.batch_ramp.increment=2")
    arguments = (*ONE_RANK, *ramp, "train.batch_ramp.length=3K", "optim.warmup=1K")
    finished = tmp_path / "finished"
    run_ranks(fit, 1, short_run(data, finished, *arguments))
    sizes = [row["tokens"] for row in rows(finished) if "loss" in row]
    assert [float(size) / 128 for size in sizes] == pytest.approx([2] * 6 + [4] * 3 + [6], rel=0.2)
    resumed = cut_off(finished, tmp_path / "resumed")
    run_ranks(fit, 1, short_run(data, resumed, *arguments))
    assert_goes_on(resumed, finished, 5)
