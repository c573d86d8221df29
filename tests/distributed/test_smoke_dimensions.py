"""The smoke experiment's own sizes: layouts agree with one process as closely as float32 lets them."""

from pathlib import Path

import pytest

from tests.helpers.parity import worst_difference
from tests.helpers.runs import layout, losses_of

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-6
"""Largest relative difference of a loss or a gradient norm over 5 steps."""
LAYOUTS = {"pp2 dp2": {"pp": 2, "dp": 2}, "pp2 vpp2 ep2": {"pp": 2, "vpp": 2, "ep": 2, "dp": 2}}


def smoke(data: Path, folder: Path, **sizes: int) -> list[str]:
    """Overrides of `experiment=smoke` that read the tiny shard set and change nothing of the model."""
    length = ("train.steps=5", "optim.warmup_steps=2", "optim.decay_steps=2", "train.eval_sequences=8")
    files = (f"data.dir={data}", f"run.dir={folder}")
    return ["experiment=smoke", *length, *files, *layout(**sizes)]


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    return losses_of([*smoke(data, tmp_path_factory.mktemp("alone")), "dep.mode=coupled"], 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_agrees_with_one_process(
    name: str, alone: list[tuple[float, float]], data: Path, tmp_path: Path
) -> None:
    found = losses_of(smoke(data, tmp_path, **LAYOUTS[name]), 4)
    assert worst_difference(found, alone) <= TOLERANCE
