"""Weights by step, and what a run draws with them."""

from __future__ import annotations

import pytest

from k25_train.compose.resolve import compose
from k25_train.data.mix.mixture import mixtures, planned_tokens

SMOKE = ["experiment=smoke"]
LATE = (
    "data.schedule={last: {from_step: 81, weights: {text: 0}}, "
    "late: {from_step: 41, weights: {text: 0.1}, vision_ratio: 0.5}}"
)
MEDIA = {"caption", "ocr", "video"}


def test_a_schedule_changes_what_it_names_and_keeps_the_rest() -> None:
    first, late, last = mixtures(compose([*SMOKE, LATE]).data)
    assert (first.first_step, first.vision_ratio) == (1, None)
    assert first.weights == {"text": 0.6, "caption": 0.25, "ocr": 0.05, "video": 0.1}
    assert (late.first_step, late.vision_ratio, late.weights) == (41, 0.5, {**first.weights, "text": 0.1})
    assert (last.first_step, last.vision_ratio, last.weights) == (81, 0.5, {**first.weights, "text": 0})
    (only,) = mixtures(compose([*SMOKE, "data.schedule={all: {from_step: 1, weights: {text: 2}}}"]).data)
    assert (only.first_step, only.weights["text"]) == (1, 2)


def test_shares_follow_the_ratio_and_the_weights_within() -> None:
    first, late, last = mixtures(compose([*SMOKE, LATE]).data)
    assert first.shares(MEDIA) == pytest.approx(first.weights)
    within = {"text": 0.5, "caption": 0.3125, "ocr": 0.0625, "video": 0.125}
    assert late.shares(MEDIA) == pytest.approx(within)
    # Nothing of text is left, so all is vision.
    assert last.shares(MEDIA) == pytest.approx({"text": 0, "caption": 0.625, "ocr": 0.125, "video": 0.25})


def test_a_run_draws_what_its_steps_do() -> None:
    data = compose([*SMOKE, LATE]).data
    tokens = planned_tokens(data, MEDIA, num_steps=100, tokens_after=lambda steps: 1000 * steps)
    assert tokens["text"] == pytest.approx(40 * 600 + 40 * 500)
    assert sum(tokens.values()) == pytest.approx(100_000)
    assert sum(
        planned_tokens(data, MEDIA, num_steps=30, tokens_after=lambda steps: 1000 * steps).values()
    ) == pytest.approx(30_000)
