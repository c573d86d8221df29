"""Training with the decoupled encoder where ranks share sequences is training in one process."""

from collections.abc import Sequence

import pytest

from tests.helpers.encoder_ways import WAYS
from tests.helpers.parity import (
    TOLERANCE,
    Case,
    Parity,
    assert_first_loss_agrees,
    worst_difference,
)

pytestmark = pytest.mark.distributed

FEW = ("train.steps=5", "optim.warmup=1", "optim.decay=1")
LAYOUTS = (
    {"cp": 2},
    {"pp": 2, "cp": 2},
    {"dp": 2, "cp": 2},
    {"pp": 2, "vpp": 2, "cp": 2},
    {"pp": 2, "vpp": 2, "dp": 2, "cp": 2},
    {"pp": 2, "vpp": 2, "ep": 4, "dp": 2, "cp": 2},
    {"cp": 4},
    {"pp": 2, "cp": 4},
)


def check(parity: Parity, sizes: dict[str, int], way: Sequence[str], *changes: str) -> None:
    """A layout against one process with a coupled tower."""
    alone = Case({}, 8, 16, ("dep.mode=coupled", *changes))
    found = parity.losses(Case(sizes, 8, 16, (*way, *changes)))
    expected = parity.losses(alone)
    assert_first_loss_agrees(found, expected)
    assert worst_difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("way", ["upfront", "bubbles"])
def test_ranks_that_share_sequences_train_as_one_process(way: str, parity: Parity) -> None:
    check(parity, {"pp": 2, "vpp": 2, "cp": 2}, WAYS[way], *FEW)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["upfront", "bubbles"])
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_every_layout_trains_as_one_process(sizes: dict[str, int], way: str, parity: Parity) -> None:
    check(parity, sizes, WAYS[way])
