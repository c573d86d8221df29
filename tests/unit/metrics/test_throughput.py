"""Smoothed step time, time left, and durations for people."""

from __future__ import annotations

import pytest

from k25_train.metrics.throughput import Throughput
from k25_train.units import format_duration


def test_constant_pace_is_exact_from_the_first_step() -> None:
    throughput = Throughput(total_steps=10)
    assert throughput.step_time_s == 0
    for step in range(1, 4):
        throughput.add(0.5)
        assert throughput.step_time_s == pytest.approx(0.5)
        assert throughput.time_left_s(step) == pytest.approx(0.5 * (10 - step))
    assert throughput.time_left_s(10) == 0
    assert throughput.time_left_s(11) == 0


def test_recent_steps_count_most() -> None:
    throughput = Throughput(total_steps=1000)
    for step_time_s in [4.0] * 50 + [1.0] * 50:
        throughput.add(step_time_s)
    assert 1.0 < throughput.step_time_s < 1.4


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (192, "3m12s"),
        (7500, "2h05m"),
        (86399, "23h59m"),
        (273600, "3d04h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
