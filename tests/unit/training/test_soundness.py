"""Which steps are sound: skipped ones, absurd losses, jumps over all recent ones, ruined evaluations."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from k25_train.training.soundness import Soundness, Verdict

GUESSING = math.log(1000)


def step(loss: float, grad_norm: float = 1.0, *, updated: bool = True) -> Any:
    return SimpleNamespace(loss=loss, grad_norm=grad_norm, updated=updated)


@pytest.mark.parametrize("grad_norm", [math.nan, math.inf])
@pytest.mark.parametrize("updated", [False, True])
def test_a_gradient_that_is_not_finite_is_never_sound(grad_norm: float, updated: bool) -> None:
    verdict = Soundness(1000).judge(step(6.0, grad_norm, updated=updated))
    assert (verdict.is_sound, verdict.was_skipped, verdict.weights_were_ruined) == (False, True, False)


def test_a_step_that_changed_nothing_is_not_sound() -> None:
    assert Soundness(1000).judge(step(6.0, updated=False)).was_skipped


@pytest.mark.parametrize("loss", [math.nan, math.inf, 2 * GUESSING + 0.1, 1e30])
def test_a_loss_far_above_guessing_shows_that_the_weights_are_bad(loss: float) -> None:
    verdict = Soundness(1000).judge(step(loss))
    assert (verdict.is_sound, verdict.was_skipped, verdict.weights_were_ruined) == (False, False, True)


def test_a_jump_over_all_recent_losses_is_an_alarm_while_it_lasts() -> None:
    soundness = Soundness(1000)
    assert soundness.judge(step(GUESSING + 3)).is_sound
    for number in range(100):
        assert soundness.judge(step(2.0 + number % 3)).is_sound
    for _ in range(100):
        assert not soundness.judge(step(4.0 + 0.5 * GUESSING + 0.1)).is_sound
    assert soundness.judge(step(4.0 + 0.5 * GUESSING - 0.1)).is_sound


def test_a_resumed_run_is_judged_like_one_that_went_on() -> None:
    """Else weights that a slip has ruined would count as proven by the first step after a restart."""
    before, after = Soundness(1000), Soundness(1000)
    for number in range(100):
        before.judge(step(2.0 + number % 3))
    after.recall(before.losses)
    assert (after.limit, after.losses) == (before.limit, before.losses)
    assert after.judge(step(GUESSING + 2)).weights_were_ruined
    assert Soundness(1000).judge(step(GUESSING + 2)).is_sound


def test_the_noise_of_a_young_run_is_none() -> None:
    soundness = Soundness(1000)
    assert all(soundness.judge(step(loss)).is_sound for loss in (0.1, 6.9, 0.2, 9.0, 12.0))


def test_an_evaluation_speaks_of_the_weights_after_the_step() -> None:
    soundness, sound = Soundness(1000), Verdict()
    assert soundness.judge_evaluation(sound, {}).is_sound
    assert soundness.judge_evaluation(sound, {"eval_text_loss": 6.0, "eval_caption_loss": 13.0}).is_sound
    for loss in (math.nan, math.inf, 14.0):
        verdict = soundness.judge_evaluation(sound, {"eval_text_loss": 6.0, "eval_caption_loss": loss})
        assert "eval_caption_loss" in verdict.why_unsound
        assert not verdict.weights_were_ruined
    skipped = Verdict("skipped", was_skipped=True)
    assert soundness.judge_evaluation(skipped, {"eval_text_loss": math.nan}) is skipped
