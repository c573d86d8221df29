"""Fits constants to durations: least squares over what the data can tell apart. Pure.

Durations that plans predict are sums and maxima of terms that are proportional to the constants, so
Gauss-Newton steps on relative errors end after a few. A constant is fitted only if the data determine what it
adds to a duration, the other fitted constants being free; the first one always is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Predict = Callable[[Floats], Floats]
"""Constants -> durations."""
LEAST_NOISE = 0.005
"""Relative error that each duration has at least: plans leave out what takes as much. Our choice."""
MOST_UNCERTAIN = 0.05
"""What a fitted constant adds to durations is known to that share of them. Our choice."""
WIDTHS = (0.3, 0.03, 1e-4)
"""Changes of constants by which slopes are taken, as shares of them, one after another: where predictions
have a kink, a wide one sees both sides. Our choice."""
MOST_ROUNDS = 8
"""With slopes of each width."""
MOST_HALVINGS = 5
SETTLED = 1e-20
"""Sum of squared errors, in units of the noise, that counts as none."""
GAINED = 1e-6
"""Share of that sum by which another round has to make it smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """Something to fit."""

    start: float
    """Its value so far, which it keeps if it is not fitted."""
    least: float
    """Smallest value that makes sense."""
    unit: float
    """A change of it that can be seen in durations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What became of one constant."""

    value: float
    """Fitted, or as it was."""
    error: float | None = None
    """Standard error; None if it was not fitted."""
    wanted: float | None = None
    """Where the data would have it, if that is below what makes sense."""
    wanted_share: float = 0.0
    """By how much that makes durations shorter, as a share of them."""


def fit(predict: Predict, measured: Floats, noise: Floats, constants: Sequence[Constant]) -> list[Fitted]:
    """Constants with which predictions come closest to measured durations.

    Args:
        predict: what constants, in the order of `constants`, predict.
        measured: durations, all above 0.
        noise: their relative errors.
        constants: what to fit; the first one always is.
    """
    problem = _Problem(predict, measured, np.maximum(noise, LEAST_NOISE), constants)
    # 1. The first constant alone brings durations to their size; then whatever can be told apart.
    values = problem.solved(np.array([each.start for each in constants]), [0], WIDTHS[:1])
    chosen = problem.told_apart(values)
    values = problem.solved(values, chosen)
    # 2. What would be negative makes no sense, and what changes durations by less than its error is noise.
    refused: dict[int, Fitted] = {}
    while (index := problem.least_certain(values, chosen)) is not None:
        constant = constants[index]
        if values[index] < constant.least:
            share = problem.share(values, index) * float(values[index] - constant.least)
            refused[index] = Fitted(value=constant.start, wanted=float(values[index]), wanted_share=share)
        chosen = [each for each in chosen if each != index]
        values[index] = constant.start
        values = problem.solved(values, chosen)
    # 3. What is left, with its errors.
    errors = problem.errors(values, chosen)
    return [
        refused.get(index, Fitted(value=float(values[index]), error=errors.get(index)))
        for index in range(len(constants))
    ]


class _Problem:
    """Relative errors of predictions, in units of the noise."""

    def __init__(
        self, predict: Predict, measured: Floats, noise: Floats, constants: Sequence[Constant]
    ) -> None:
        self.predict, self.measured, self.noise, self.constants = predict, measured, noise, constants
        self._found: dict[bytes, Floats] = {}

    def offs(self, values: Floats) -> Floats:
        """[duration] -> how far off its prediction is."""
        # Plans of large jobs take a second.
        key = values.tobytes()
        if key not in self._found:
            self._found[key] = (self.predict(values) / self.measured - 1) / self.noise
        return self._found[key]

    def slopes(self, values: Floats, chosen: Sequence[int], width: float = WIDTHS[-1]) -> Floats:
        """[duration, chosen constant] -> how its prediction changes with the constant."""
        at, columns = self.offs(values), []
        for index in chosen:
            moved, step = values.copy(), width * max(self.constants[index].unit, abs(values[index]))
            moved[index] += step
            columns.append((self.offs(moved) - at) / step)
        return np.stack(columns, axis=1)

    def share(self, values: Floats, index: int) -> float:
        """How much longer a unit of a constant makes durations on average, as a share of them."""
        return float(self._shares(self.slopes(values, [index]))[0])

    def _shares(self, slopes: Floats) -> Floats:
        """[constant] -> the same; durations count by how well they are known."""
        found: Floats = np.sum(np.abs(slopes), axis=0) / np.sum(1 / self.noise)
        return found

    def solved(self, values: Floats, chosen: Sequence[int], widths: Sequence[float] = WIDTHS) -> Floats:
        """Values after Gauss-Newton steps of the chosen constants, halved where they do not help."""
        for width in widths:
            for _ in range(MOST_ROUNDS):
                before = self.offs(values)
                if before @ before < SETTLED:
                    return values
                values = self._stepped(values, before, self.slopes(values, chosen, width), chosen)
                after = self.offs(values)
                if after @ after > (1 - GAINED) * (before @ before):
                    break
        return values

    def _stepped(self, values: Floats, offs: Floats, slopes: Floats, chosen: Sequence[int]) -> Floats:
        """Values after one step, or as they were if none helps."""
        scale = np.maximum(np.linalg.norm(slopes, axis=0), 1e-300)
        step = np.linalg.lstsq(slopes / scale, -offs, rcond=1e-12)[0] / scale
        for halvings in range(MOST_HALVINGS):
            tried = values.copy()
            tried[list(chosen)] += step / 2**halvings
            found = self.offs(tried)
            if found @ found < offs @ offs:
                return tried
        return values

    def told_apart(self, values: Floats) -> list[int]:
        """Which constants the data determine: the first, then the most independent one of the others."""
        every = range(len(self.constants))
        slopes = self.slopes(values, every)
        # 1. Each in units of what makes durations twice as long on average.
        mean = self._shares(slopes)
        columns = slopes / np.where(mean > 0, mean, 1)
        chosen, left = [0], [index for index in every if index and mean[index] > 0]
        while left and len(chosen) < len(self.measured):
            basis, _ = np.linalg.qr(columns[:, chosen])
            independent = np.linalg.norm(columns - basis @ (basis.T @ columns), axis=0)
            best = max(left, key=lambda index: float(independent[index]))
            # 2. Its inverse is the standard error of what the constant adds, given the ones chosen before.
            if independent[best] * MOST_UNCERTAIN < 1:
                break
            chosen.append(best)
            left.remove(best)
        return chosen

    def errors(self, values: Floats, chosen: Sequence[int]) -> dict[int, float]:
        """Chosen constant -> its standard error."""
        slopes = self.slopes(values, chosen)
        scale = np.maximum(np.linalg.norm(slopes, axis=0), 1e-300)
        inverse = np.linalg.pinv((slopes / scale).T @ (slopes / scale))
        return dict(zip(chosen, (np.sqrt(np.diag(inverse)) / scale).tolist(), strict=True))

    def least_certain(self, values: Floats, chosen: Sequence[int]) -> int | None:
        """The fitted constant that is negative, or closest to where it was in units of its error if that is
        less than one; None if all are in order. The first constant stays."""
        errors = self.errors(values, chosen)
        others = [index for index in chosen if index]

        def certainty(index: int) -> float:
            constant, value = self.constants[index], float(values[index])
            if value < constant.least:
                return value - constant.least
            return abs(value - constant.start) / max(errors[index], 1e-300)

        worst = min(others, key=certainty, default=None)
        return worst if worst is not None and certainty(worst) < 1 else None
