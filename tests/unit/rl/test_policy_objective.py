"""The objective over step files against the printed equation: packing, replicas, branches."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.config.algorithm import OtherVersions
from k25_train.data.trajectories.documents import NAME
from k25_train.objectives.policy_gradient import PolicyGradient
from tests.helpers.bigram_policy import WORDS, Found, by_equation, made_policy
from tests.helpers.equation_trials import HIGH, LAYOUTS, LOW, PENALTY, TOLERANCE, Trials, errors_of
from tests.helpers.step_files import write_steps
from tests.helpers.tiny_shards import VOCAB_SIZE


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tmp_path_factory.mktemp("policy"))


def assert_close(found: Found, loss: float, gradient: torch.Tensor) -> None:
    assert max(errors_of(found, loss, gradient)) <= TOLERANCE


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(2, 5), min_size=1, max_size=5),
    normalize=st.booleans(),
    other_versions=st.sampled_from(OtherVersions),
    skip_equal_rewards=st.booleans(),
    number=st.integers(0, len(LAYOUTS) - 1),
    micro_batch_size=st.sampled_from([1, 2]),
)
def test_loss_and_gradient_are_the_equations(
    trials: Trials,
    seed: int,
    sizes: list[int],
    normalize: bool,
    other_versions: OtherVersions,
    skip_equal_rewards: bool,
    number: int,
    micro_batch_size: int,
) -> None:
    rollouts = trials.rollouts(seed, sizes=sizes, num_images=seed % 3)
    options: dict[str, Any] = {
        "normalize": normalize, "other_versions": other_versions, "skip_equal_rewards": skip_equal_rewards,
        "current_version": 1,
    }  # fmt: skip
    found = trials.errors(trials.config(number, micro_batch_size), rollouts, seed, **options)
    assert max(found) <= TOLERANCE


def test_every_split_is_the_equation(trials: Trials) -> None:
    rollouts = trials.rollouts(3, sizes=(4, 3, 2, 5), num_images=1)
    write_steps(trials.folder / "steps", [rollouts.weighted()])
    policy = made_policy(VOCAB_SIZE, 3)
    loss, gradient = by_equation(rollouts, policy, low=LOW, high=HIGH, penalty=PENALTY)
    for number, size in ((0, 1), (1, 2), (2, 4), (3, 2), (4, 1)):
        found = trials.found(trials.config(number, size), policy)
        assert_close(found, loss, gradient)
        generated = sum(int(each.generated.sum()) for each in rollouts.trajectories)
        assert found.sums["policy/tokens"] == generated


@pytest.mark.parametrize("number", [0, 4])
def test_sequences_of_data_add_their_mean_loss(trials: Trials, number: int) -> None:
    rollouts = trials.rollouts(5)
    write_steps(trials.folder / "steps", [rollouts.weighted()])
    policy = made_policy(VOCAB_SIZE, 5)
    loss, gradient = by_equation(rollouts, policy, low=LOW, high=HIGH, penalty=PENALTY)
    pairs = torch.zeros_like(policy)
    plan = trials.data.plan(0)
    for batch in trials.data.read_sequences(plan.sequences, WORDS):
        own = batch.loss_mask > 0
        pairs.index_put_((batch.tokens[own], batch.labels[own]), torch.ones(1).double(), accumulate=True)
    mean = pairs / pairs.sum()
    found = trials.found(trials.config(number, 1, 0.3), policy)
    assert_close(found, loss - 0.3 * float((mean * policy).sum()), gradient - 0.3 * mean)
    assert sum(found.sums[f"tokens/{name}"] for name in trials.data.sources) == pairs.sum()
    assert found.sums[f"tokens/{NAME}"] == 0


def test_whole_responses_are_k15s_square(trials: Trials) -> None:
    """Per trajectory -A·L + τ/2·L², whose slope by L is that of (A - τ·L)² / 2τ."""
    rollouts = trials.rollouts(7, sizes=(3, 4), has_branches=False)
    rows = rollouts.weighted()
    write_steps(trials.folder / "steps", [rows])
    policy = made_policy(VOCAB_SIZE, 7)
    gradient, loss = torch.zeros_like(policy), 0.0
    for group in (0, 1):
        own = [each for each in rollouts.trajectories if rollouts.groups[each.response] == group]
        rewards = rollouts.rewards[rollouts.groups == group]
        count = sum(int(each.generated.sum()) for each in own)
        for each in own:
            places = [
                (each.tokens[i - 1], each.tokens[i]) for i in range(len(each.tokens)) if each.generated[i]
            ]
            drawn = each.rollout_logprobs[each.generated].astype(np.float64)
            ratio = sum(float(policy[place]) for place in places) - drawn.sum()
            advantage = rollouts.rewards[each.response] - rewards.mean()
            loss += (PENALTY / 2 * ratio**2 - advantage * ratio) / count / 2
            for place in places:
                gradient[place] += (PENALTY * ratio - advantage) / count / 2
    for number in (0, 1, 2):
        assert_close(trials.found(trials.config(number, 2), policy, is_sequence=True), loss, gradient)


def test_figures_tell_masks_and_tails(trials: Trials) -> None:
    rollouts = trials.rollouts(11)
    policy = made_policy(VOCAB_SIZE, 11)
    outlier = rollouts.trajectories[0].rollout_logprobs.copy()
    first = int(np.flatnonzero(rollouts.trajectories[0].generated)[0])
    outlier[first] = -30.0
    changed = [replace(rollouts.trajectories[0], rollout_logprobs=outlier), *rollouts.trajectories[1:]]
    rollouts = replace(rollouts, trajectories=changed)
    write_steps(trials.folder / "steps", [rollouts.weighted()])
    found = trials.found(trials.config(), policy)
    objective = PolicyGradient(
        [*trials.data.sources, NAME], (), ratio_low=LOW, ratio_high=HIGH, ratio_penalty=0.0, is_sequence=False
    )
    figures = objective.figures(found.sums)
    gaps = np.array(
        [
            float(policy[each.tokens[i - 1], each.tokens[i]]) - float(each.rollout_logprobs[i])
            for each in changed
            for i in range(len(each.tokens))
            if each.generated[i]
        ]
    )
    below, above = (gaps < np.log(LOW)).mean(), (gaps > np.log(HIGH)).mean()
    assert figures["policy/below_share"] == pytest.approx(below)
    assert figures["policy/above_share"] == pytest.approx(above)
    assert figures["policy/mask_share"] == pytest.approx(below + above)
    assert figures["policy/gap"] == pytest.approx(np.abs(gaps).mean(), rel=1e-5)
    assert figures["policy/log_ratio"] == pytest.approx(gaps.mean(), rel=1e-5)
    assert figures["policy/ratio"] == pytest.approx(np.exp(gaps.clip(max=20)).mean(), rel=1e-4)
    assert figures["policy/gap_max"] == pytest.approx(10**1.5)
    assert (
        np.quantile(np.abs(gaps), 0.5)
        <= figures["policy/gap_p50"]
        <= 10**0.5 * np.quantile(np.abs(gaps), 0.5)
    )
    assert figures["policy/gap_p99"] >= np.quantile(np.abs(gaps), 0.99)
    assert not any(name.startswith("loss/") for name in figures)
    assert objective.loss(found.sums) == pytest.approx(found.loss)
