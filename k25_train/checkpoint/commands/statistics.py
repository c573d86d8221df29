"""What is told of a tensor's values, and of two tensors' difference; of pieces, which add up to the whole."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of the elements of a tensor, of a piece of one, or of several."""

    num_elements: int = 0
    sum_of_squares: float = 0.0
    """Of what is finite, summed in float64."""
    max_abs: float = 0.0
    """Of what is finite."""
    num_not_finite: int = 0
    num_zero: int = 0

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            self.num_elements + other.num_elements,
            self.sum_of_squares + other.sum_of_squares,
            max(self.max_abs, other.max_abs),
            self.num_not_finite + other.num_not_finite,
            self.num_zero + other.num_zero,
        )

    @property
    def norm(self) -> float:
        """L2 norm."""
        return math.sqrt(self.sum_of_squares)

    @property
    def rms(self) -> float:
        """Root of the mean square, which compares tensors of different sizes."""
        return math.sqrt(self.sum_of_squares / self.num_elements) if self.num_elements else 0.0

    def as_json(self) -> dict[str, float]:
        """Values under the names of `--json`."""
        return {
            "l2": self.norm,
            "rms": self.rms,
            "max_abs": self.max_abs,
            "num_not_finite": self.num_not_finite,
            "num_zero": self.num_zero,
        }


def statistics_of(values: Tensor) -> Statistics:
    """Of a flat tensor of any dtype."""
    if not values.numel():
        return Statistics()
    numbers, num_not_finite = _finite(values)
    return Statistics(
        values.numel(),
        _sum_of_squares(numbers),
        float(torch.linalg.vector_norm(numbers, math.inf)),
        num_not_finite,
        values.numel() - int(torch.count_nonzero(values)),
    )


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two tensors with the same number of elements, or of pieces of them."""

    num_elements: int = 0
    num_unequal: int = 0
    """Elements with different bits; of tensors of different dtypes, with different values."""
    max_abs: float = 0.0
    """Largest |a − b|; infinite where one is finite and the other is not."""
    largest: float = 0.0
    """Largest finite |a|."""
    dot: float = 0.0
    """Σ a·b of what is finite in both, in float64."""
    squares: tuple[float, float] = (0.0, 0.0)
    """Σ a² and Σ b², of what is finite in both."""

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(
            self.num_elements + other.num_elements,
            self.num_unequal + other.num_unequal,
            max(self.max_abs, other.max_abs),
            max(self.largest, other.largest),
            self.dot + other.dot,
            (self.squares[0] + other.squares[0], self.squares[1] + other.squares[1]),
        )

    @property
    def is_equal(self) -> bool:
        """Whether no element differs."""
        return not self.num_unequal

    @property
    def relative(self) -> float:
        """Largest |a − b| over the largest |a|; infinite where a is all zeros and b is not."""
        if not self.max_abs:
            return 0.0
        return self.max_abs / self.largest if self.largest else math.inf

    @property
    def cosine(self) -> float:
        """Of the angle between both; 1 where both are all zeros, 0 where one is."""
        norms = math.sqrt(self.squares[0]) * math.sqrt(self.squares[1])
        if norms:
            return max(-1.0, min(1.0, self.dot / norms))
        return float(self.squares[0] == self.squares[1])


def difference_of(one: Tensor, other: Tensor) -> Difference:
    """Of two flat tensors of equal length, of any dtypes."""
    if not one.numel():
        return Difference()
    num_unequal = _num_unequal(one, other)
    if not num_unequal:
        # Nothing else to find out, at the cost of reading alone, which most comparisons are.
        numbers, _ = _finite(one)
        squares = _sum_of_squares(numbers)
        largest = float(torch.linalg.vector_norm(numbers, math.inf))
        return Difference(one.numel(), 0, 0.0, largest, squares, (squares, squares))
    a, b = _numbers(one), _numbers(other)
    is_finite = torch.isfinite(a) & torch.isfinite(b)
    # Bits may differ where values do not: zeros of both signs, and NaN.
    is_alike = (a == b) | (torch.isnan(a) & torch.isnan(b))
    goes_off = bool((~(is_finite | is_alike)).any())
    a, b = torch.where(is_finite, a, 0.0), torch.where(is_finite, b, 0.0)
    return Difference(
        one.numel(),
        num_unequal,
        math.inf if goes_off else float((a - b).abs().max()),
        float(torch.linalg.vector_norm(a, math.inf)),
        float(torch.dot(a, b)),
        (_sum_of_squares(a), _sum_of_squares(b)),
    )


def _num_unequal(one: Tensor, other: Tensor) -> int:
    if one.dtype == other.dtype:
        # As bytes, since NaN differs from itself; by elements only where something differs.
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
        a, b = one.contiguous().view(bits), other.contiguous().view(bits)
        return 0 if torch.equal(a, b) else int(torch.count_nonzero(a != b))
    return int(torch.count_nonzero(_numbers(one) != _numbers(other)))


def _numbers(values: Tensor) -> Tensor:
    """Exact in float64: every dtype that checkpoints have but large 64-bit counts."""
    return values.to(torch.float64)


def _finite(values: Tensor) -> tuple[Tensor, int]:
    """The values with zeros for what is not finite, and how many elements those were."""
    numbers = values if values.is_floating_point() else _numbers(values)
    if numbers.dtype.itemsize < 4:
        numbers = numbers.to(torch.float32)  # sums of squares and float8 need it
    if math.isfinite(float(torch.linalg.vector_norm(numbers, math.inf))):
        return numbers, 0
    is_finite = torch.isfinite(numbers)
    return torch.where(is_finite, numbers, 0.0), numbers.numel() - int(torch.count_nonzero(is_finite))


def _sum_of_squares(numbers: Tensor) -> float:
    return float(torch.linalg.vector_norm(numbers, 2, dtype=torch.float64)) ** 2
