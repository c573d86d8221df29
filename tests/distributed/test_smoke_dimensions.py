"""The smoke experiment's own sizes: layouts agree with one process as closely as float32 lets them."""

from pathlib import Path

import pytest

from tests.helpers.parity import worst_difference
from tests.helpers.runs import losses_of
from tests.helpers.smoke_dimensions import SMOKE_LAYOUTS, SMOKE_TOLERANCE, smoke_overrides

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    return losses_of([*smoke_overrides(data, tmp_path_factory.mktemp("alone")), "dep.mode=coupled"], 1)


@pytest.mark.parametrize("name", SMOKE_LAYOUTS)
def test_a_layout_agrees_with_one_process(
    name: str, alone: list[tuple[float, float]], data: Path, tmp_path: Path
) -> None:
    found = losses_of(smoke_overrides(data, tmp_path, **SMOKE_LAYOUTS[name]), 4)
    assert worst_difference(found, alone) <= SMOKE_TOLERANCE
