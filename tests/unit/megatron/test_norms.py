"""Norms of large tensors against float64."""

import pytest
import torch
from torch import Tensor

from parallel.norms import BLOCK, frobenius_norms, sum_of_squares

SIZES = [10**6, 6 * 10**6, pytest.param(5 * 10**7, marks=pytest.mark.slow)]
TOLERANCE = 1e-12


def numbers(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def plain_sum(tensor: Tensor) -> float:
    """Squares in float64, added in torch's pairs."""
    return sum(float(part.double().square().sum()) for part in tensor.flatten().split(10**6))


@pytest.mark.parametrize("size", SIZES)
def test_a_norm_is_float64s_whatever_the_size(size: int) -> None:
    tensor = numbers(size)
    expected = plain_sum(tensor)
    assert float(sum_of_squares([tensor])) == pytest.approx(expected, rel=TOLERANCE)
    rows = tensor.view(2, 250, -1)
    squares = [plain_sum(matrix) for matrix in rows]
    found = frobenius_norms(rows).square().flatten().tolist()
    assert found == pytest.approx(squares, rel=TOLERANCE)


@pytest.mark.parametrize("cuts", [(1, BLOCK, 3 * BLOCK + 1), (7, 11, 13), (0, 0, 10**6)])
def test_a_norm_does_not_depend_on_how_a_tensor_is_cut(cuts: tuple[int, ...]) -> None:
    """As layouts do it: a shard may be empty."""
    tensor = numbers(10**6)
    parts = list(tensor.tensor_split(cuts))
    assert float(sum_of_squares(parts)) == pytest.approx(plain_sum(tensor), rel=TOLERANCE)


def test_squares_that_float32_cannot_hold_are_added() -> None:
    tensor = torch.tensor([3e30, 4e30, 3e-30, 4e-30])
    assert float(sum_of_squares([tensor])) ** 0.5 == pytest.approx(5e30)
    assert float(sum_of_squares([tensor[2:]])) ** 0.5 == pytest.approx(5e-30)


def test_parts_that_do_not_lie_together_are_read_in_full() -> None:
    matrix = numbers(600).view(20, 30)
    assert float(sum_of_squares([matrix.T[3:]])) == pytest.approx(plain_sum(matrix[:, 3:]), rel=TOLERANCE)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(value: float) -> None:
    tensor = numbers(10**6)
    tensor[-1] = value
    assert not sum_of_squares([tensor, numbers(3)]).isfinite()


def test_a_meta_tensor_of_any_size_is_not_cut() -> None:
    """A dry run's have billions of elements: in blocks, it took six times as long."""
    tensor = torch.empty(10**15, device="meta")
    assert sum_of_squares([tensor]).dtype is torch.float64
    assert frobenius_norms(tensor.view(10, 10**7, 10**7)).shape == (10, 1, 1)
