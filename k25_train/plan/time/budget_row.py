"""A row of the budget of a step, and the rates of devices that rows are computed with; torch-free."""

from dataclasses import dataclass

from k25_train.units import GB

MEMORY_GB_PER_S = 2850.0
"""GB per second that kernels which only move data read and write. Source: 85% of the data sheet's 3,350 (H100
and H800, SXM5); to be measured."""


@dataclass(frozen=True, slots=True)
class BudgetRow:
    """What takes time in a step next to the model's FLOPs."""

    what: str
    """What takes time."""
    seconds: float
    """How long, in a step, while nothing else of the step progresses."""
    how: str
    """What it is computed from."""
    in_rate: bool = False
    """Whether the rate of model FLOPs has it in it, so that it is not added."""


def moved_s(num_bytes: float) -> float:
    """How long so many bytes are read or written."""
    return num_bytes / (GB * MEMORY_GB_PER_S)
