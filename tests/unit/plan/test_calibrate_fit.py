"""The fit of constants to durations, on durations that are made of known ones."""

from collections.abc import Sequence

import numpy as np
import pytest

from k25_train.plan.calibrate.fit import Constant, Fitted, Floats, fit

RATE = Constant(start=1.0, least=1e-9, unit=1.0)
MORE = Constant(start=0.0, least=0.0, unit=1.0)
RUNS = np.array([[2.0, 0.1, 1.0], [3.0, 0.5, 1.0], [1.0, 0.3, 1.0], [6.0, 0.2, 1.0], [0.5, 0.9, 1.0]])
"""[duration] -> seconds of computation, of messages, and 1 for what each has in addition."""
TRUTH = np.array([2.5, 4.0, 0.8])


def sums(values: Floats) -> Floats:
    return RUNS @ values


def kinked(values: Floats) -> Floats:
    """Computation or messages, whichever takes longer, as with overlap."""
    found: Floats = np.maximum(RUNS[:, 0] * values[0], 3 * RUNS[:, 1] * values[1]) + RUNS[:, 2] * values[2]
    return found


def fitted(found: Sequence[Fitted]) -> list[int]:
    return [index for index, each in enumerate(found) if each.error is not None]


@pytest.mark.parametrize("predict", [sums, kinked])
@pytest.mark.parametrize("truth", [TRUTH, np.array([40.0, 0.3, 0.0]), np.array([0.2, 0.1, 3.0])])
def test_known_constants_are_found(predict: object, truth: Floats) -> None:
    assert callable(predict)
    found = fit(predict, predict(truth), np.zeros(5), [RATE, RATE, MORE])
    np.testing.assert_allclose(predict(np.array([each.value for each in found])), predict(truth), rtol=1e-6)
    for index in fitted(found):
        assert found[index].value == pytest.approx(truth[index], rel=1e-6, abs=1e-9)


def test_noise_moves_constants_by_as_much_as_errors_say() -> None:
    draw, offs = np.random.default_rng(0), []
    for _ in range(60):
        measured = sums(TRUTH) * (1 + 0.01 * draw.standard_normal(5))
        found = fit(sums, measured, np.full(5, 0.01), [RATE, RATE, MORE])
        assert found[0].error is not None
        offs.append((found[0].value - TRUTH[0]) / found[0].error)
    assert 0.7 < float(np.std(offs)) < 1.3


def test_what_durations_do_not_tell_apart_stays() -> None:
    # 1. One duration, and several equal ones: only the first constant.
    for rows in (RUNS[:1], np.repeat(RUNS[:1], 4, axis=0)):
        found = fit(
            lambda values, rows=rows: rows @ values, rows @ TRUTH, np.zeros(len(rows)), [RATE, RATE, MORE]
        )
        assert fitted(found) == [0]
        assert [each.value for each in found[1:]] == [1.0, 0.0]
    # 2. A constant that nothing depends on.
    idle = RUNS * [1, 0, 1]
    found = fit(lambda values: idle @ values, idle @ TRUTH, np.zeros(5), [RATE, RATE, MORE])
    assert fitted(found) == [0, 2]
    # 3. Two that do the same: one of them.
    twins = RUNS[:, [0, 1, 1]]
    found = fit(lambda values: twins @ values, twins @ TRUTH, np.zeros(5), [RATE, RATE, MORE])
    assert len(fitted(found)) == 2


def test_what_would_be_below_nothing_stays_and_is_told() -> None:
    truth = np.array([2.5, 4.0, -0.1])
    found = fit(sums, sums(truth), np.zeros(5), [RATE, RATE, MORE])
    assert (found[2].value, found[2].error) == (0.0, None)
    assert found[2].wanted == pytest.approx(-0.1, rel=1e-6)
    assert -0.1 < found[2].wanted_share < 0


def test_an_effect_below_the_noise_stays() -> None:
    truth = np.array([2.5, 1.0, 0.002])
    found = fit(sums, sums(truth), np.full(5, 0.02), [RATE, RATE, MORE])
    assert fitted(found) == [0]
    assert found[0].value == pytest.approx(2.5, rel=1e-2)
