"""Smoothed step time, time left, and durations for people."""

from __future__ import annotations

import pytest

from k25_train.config.batches import batch_schedule
from k25_train.metrics.throughput import Throughput
from k25_train.units import format_duration

CONSTANT = batch_schedule(8, 64, None, 1, 0)


def test_constant_pace_is_exact_from_the_first_step() -> None:
    throughput = Throughput(10, CONSTANT)
    assert throughput.sequence_s == 0
    for step in range(1, 4):
        throughput.add(step, 0.5)
        assert throughput.sequence_s == pytest.approx(0.5 / 8)
        assert throughput.time_left_s(step) == pytest.approx(0.5 * (10 - step))
    assert throughput.time_left_s(10) == 0
    assert throughput.time_left_s(11) == 0


def test_recent_steps_count_most() -> None:
    throughput = Throughput(1000, CONSTANT)
    for step, step_time_s in enumerate([4.0] * 50 + [1.0] * 50, start=1):
        throughput.add(step, step_time_s)
    assert 1.0 < 8 * throughput.sequence_s < 1.4


def test_steps_of_larger_batches_take_longer() -> None:
    """Four steps of 2 sequences, then of 4."""
    throughput = Throughput(8, batch_schedule(4, 64, 2, 2, 4))
    for step in (1, 2, 3):
        throughput.add(step, 1.0)
    assert throughput.time_left_s(3) == pytest.approx(1.0 + 4 * 2.0)


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
