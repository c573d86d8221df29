"""Rewards of groups to weights of tokens: means, N, branches, versions, groups that are left out."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.config.algorithm import OtherVersions
from k25_train.errors import TrainingError
from k25_train.rl.advantages import TokenWeights, advantages_of, token_weights

GROUPS = np.array([0, 0, 0, 1, 1])
REWARDS = np.array([1.0, 0.0, 0.5, 2.0, 2.0])
RESPONSES = np.array([0, 0, 1, 2, 3, 4])
"""The first response has two branches."""
OFFSETS = np.array([0, 4, 7, 9, 12, 14, 17])
GENERATED = np.array([0, 1, 1, 1, 0, 0, 1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 1], dtype=bool)
VERSIONS = np.where(GENERATED, 3, -1)
VERSIONS[[1, 15]] = 2


def weights(**more: Any) -> TokenWeights:
    options: dict[str, Any] = {
        "current_version": 3, "other_versions": OtherVersions.train, "skip_equal_rewards": False,
    }  # fmt: skip
    return token_weights(
        advantages_of(REWARDS, GROUPS, normalize=False),
        GROUPS,
        responses=RESPONSES,
        offsets=OFFSETS,
        generated=GENERATED,
        versions=VERSIONS,
        **{**options, **more},
    )


def test_rewards_are_held_against_the_mean_of_their_group() -> None:
    found = advantages_of(REWARDS, GROUPS, normalize=False)
    assert found.of_responses.tolist() == [0.5, -0.5, 0.0, 0.0, 0.0]
    assert found.is_equal.tolist() == [False, True]
    of_deviation = advantages_of(REWARDS, GROUPS, normalize=True).of_responses
    assert of_deviation[:3] == pytest.approx(np.array([1, -1, 0]) * 0.5 / REWARDS[:3].std())
    assert of_deviation[3:].tolist() == [0.0, 0.0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(2, 7))
def test_equal_rewards_have_no_advantage_at_all(rewards: list[float], size: int) -> None:
    """0.1 three times has a mean that is not 0.1."""
    groups = np.repeat(np.arange(len(rewards)), size)
    found = advantages_of(np.repeat(rewards, size), groups, normalize=True)
    assert found.is_equal.all() and not found.of_responses.any()


def test_every_prompt_weighs_the_same_and_a_token_1_on_average() -> None:
    found = weights()
    per_token = found.policy_weights[GENERATED]
    assert per_token.sum() == pytest.approx(GENERATED.sum())
    # N of a prompt is of all its responses' tokens, those of both branches included.
    of_first, of_second = per_token[:7], per_token[7:]
    assert of_first.tolist() == pytest.approx([10 / (7 * 2)] * 7)
    assert of_second.tolist() == pytest.approx([10 / (3 * 2)] * 3)
    assert not found.policy_weights[~GENERATED].any() and not found.advantages[~GENERATED].any()
    assert found.advantages[GENERATED].tolist() == [0.5, 0.5, 0.5, 0.5, -0.5] + [0.0] * 5
    assert found.num_prompts == 2


def test_what_is_masked_still_counts_in_n() -> None:
    masked, penalised = (
        weights(other_versions=OtherVersions.mask),
        weights(other_versions=OtherVersions.ratio_only),
    )
    everything = weights().policy_weights
    other = GENERATED & (VERSIONS != 3)
    expected = np.where(other, 0, everything)
    for found, of_ratio in ((masked, expected), (penalised, everything)):
        assert found.policy_weights.tolist() == expected.tolist()
        assert found.ratio_weights.tolist() == of_ratio.tolist()


def test_a_group_that_is_left_out_is_no_prompt() -> None:
    found = weights(skip_equal_rewards=True)
    assert found.num_prompts == 1
    assert not found.policy_weights[12:].any() and not found.ratio_weights[12:].any()
    # The other one weighs all.
    assert found.policy_weights.sum() == pytest.approx(GENERATED.sum())


def test_an_unscored_response_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"response 1 \(group 0\) is nan"):
        advantages_of(np.array([1.0, np.nan]), np.array([0, 0]), normalize=False)
