"""Parallel equals serial: any layout trains like one process, in float32 to 1e-5 over 20 steps."""

from pathlib import Path

import pytest

from tests.helpers.runs import layout, losses_of, overrides

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
LAYOUTS = {
    "dp2": {"dp": 2},
    "ep2": {"ep": 2, "dp": 2},
    "pp2": {"pp": 2},
    "pp2 x vpp2": {"pp": 2, "vpp": 2},
    "pp2 x vpp2 x ep2, as smoke": {"pp": 2, "vpp": 2, "ep": 2, "dp": 2},
}


@pytest.fixture(scope="module")
def serial(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    arguments = overrides(data, tmp_path_factory.mktemp("run"), *layout())
    return losses_of(arguments, num_ranks=1)


def worst_difference(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> float:
    """Largest relative difference of any loss or gradient norm."""
    pairs = zip(sum(found, ()), sum(expected, ()), strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def test_the_serial_run_learns(serial: list[tuple[float, float]]) -> None:
    assert serial[-1][0] < 0.9 * serial[0][0]
    assert len(serial) == 20


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_like_one_process(
    name: str, data: Path, serial: list[tuple[float, float]], tmp_path: Path
) -> None:
    sizes = LAYOUTS[name]
    num_ranks = sizes.get("pp", 1) * sizes.get("dp", 1)
    found = losses_of(overrides(data, tmp_path, *layout(**sizes)), num_ranks)
    assert worst_difference(found, serial) <= TOLERANCE


@pytest.mark.parametrize("micro_batch_size", [2, 4])
def test_the_micro_batch_size_does_not_matter(
    micro_batch_size: int, data: Path, serial: list[tuple[float, float]], tmp_path: Path
) -> None:
    cut = f"train.micro_batch_size={micro_batch_size}"
    found = losses_of(overrides(data, tmp_path, *layout(), cut), num_ranks=1)
    assert worst_difference(found, serial) <= TOLERANCE
