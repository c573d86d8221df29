"""Norms and differences of tensors, by pieces, against plain arithmetic in float64."""

import math

import pytest
import torch
from torch import Tensor

from k25_train.checkpoint.commands.statistics import (
    Difference,
    Statistics,
    difference_of,
    statistics_of,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)


def made(dtype: torch.dtype, num: int = 1000, seed: int = 1) -> Tensor:
    values = 9.0 * torch.randn(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values[::7] = 0.0
    return (values.abs() if dtype is torch.uint8 else values).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_add_up_to_the_whole(dtype: torch.dtype) -> None:
    values = made(dtype)
    exact = values.double()
    found = sum((statistics_of(piece) for piece in values.split(300)), Statistics())
    assert found.num_elements == 1000 and found.num_not_finite == 0
    assert found.num_zero == int((exact == 0).sum()) >= 143
    assert found.max_abs == float(exact.abs().max())
    assert found.norm == pytest.approx(math.sqrt(float((exact**2).sum())), rel=1e-12)
    assert found.rms == pytest.approx(found.norm / math.sqrt(1000), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_counted_and_left_out(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, math.nan, -math.inf, 2.0, 0.0], dtype=dtype)
    found = statistics_of(values)
    assert (found.num_not_finite, found.num_zero, found.max_abs) == (2, 1, 2.0)
    assert found.sum_of_squares == pytest.approx(5.0)


def test_nothing_has_no_norm() -> None:
    empty = torch.empty(0)
    assert statistics_of(empty) == Statistics() and difference_of(empty, empty) == Difference()
    assert Statistics().rms == 0.0


def test_squares_do_not_overflow() -> None:
    assert statistics_of(torch.full((4,), 1e30)).norm == pytest.approx(2e30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_differences_add_up(dtype: torch.dtype) -> None:
    one, other = made(dtype), made(dtype)
    other[[3, 500]] += 1
    a, b = one.double(), other.double()
    pairs = zip(one.split(300), other.split(300), strict=True)
    found = sum((difference_of(*pair) for pair in pairs), Difference())
    assert found.num_unequal == 2 and not found.is_equal
    assert found.max_abs == float((a - b).abs().max())
    assert found.relative == found.max_abs / float(a.abs().max())
    assert found.cosine == pytest.approx(float(torch.dot(a, b) / (a.norm() * b.norm())), rel=1e-12)


def test_equal_is_by_bits() -> None:
    values = torch.tensor([math.nan, 0.0, 1.0])
    assert difference_of(values, values.clone()).is_equal
    signed = difference_of(values, torch.tensor([math.nan, -0.0, 1.0]))
    assert signed.num_unequal == 1 and signed.max_abs == 0.0


def test_dtypes_are_compared_by_values() -> None:
    values = made(torch.bfloat16)
    assert difference_of(values, values.float()).is_equal
    assert difference_of(values.float() + 1e-4, values).num_unequal > 0


def test_a_number_that_became_infinite_is_as_far_off_as_can_be() -> None:
    found = difference_of(torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.inf]))
    assert found.max_abs == found.relative == math.inf
    nothing = difference_of(torch.zeros(2), torch.tensor([0.0, 1e-9]))
    assert nothing.relative == math.inf and nothing.cosine == 0.0
