"""What a figure of the latest steps usually is: a median, which no single step moves."""

from collections import deque
from statistics import median

from k25_train.run_folder.rows_file import Value, is_finite

WINDOW = 100
"""Latest steps that count. Source: our choice."""
NEEDED = 20
"""Steps without which nothing is usual yet: those of a run's, or a stage's, beginning. Source: our choice."""
NORMAL = 1.4826
"""A standard deviation over a median absolute deviation, of normally distributed numbers."""
LEAST_SHARE = 0.01
"""Least deviation as a share of the median: a figure may hardly move for a while. Source: our choice."""


class Baseline:
    """The latest values of one figure."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=WINDOW)

    def add(self, value: Value) -> None:
        """Take a step's value; what is not finite says nothing of what is usual."""
        if value is not None and is_finite(value):
            self._values.append(value)

    def forget(self) -> None:
        """Begin again."""
        self._values.clear()

    @property
    def is_known(self) -> bool:
        """Whether there are enough values."""
        return len(self._values) >= NEEDED

    @property
    def usual(self) -> float:
        """The median."""
        return median(self._values)

    @property
    def deviation(self) -> float:
        """Robust standard deviation: by the median distance from the median."""
        usual = self.usual
        return max(NORMAL * median(abs(each - usual) for each in self._values), LEAST_SHARE * abs(usual))
