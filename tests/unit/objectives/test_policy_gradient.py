"""What of a token's gradient is masked, and what is not, whatever its reward; extreme ratios."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.objectives.base import NamedSums, ObjectiveOutput, PolicyTargets, Targets
from k25_train.objectives.policy_gradient import PolicyGradient

LOW, HIGH = 0.5, 2.0
RATIOS = st.floats(-6, 6)
SIGNED = st.sampled_from([-1.5, -0.25, 0.25, 1.5])


def objective(penalty: float = 0.0, *, is_sequence: bool = False) -> PolicyGradient:
    return PolicyGradient(
        ["web"], (), ratio_low=LOW, ratio_high=HIGH, ratio_penalty=penalty, is_sequence=is_sequence
    )


def scored(
    of: PolicyGradient,
    log_ratios: list[float],
    advantages: list[float],
    *,
    policy_weight: float = 1.0,
    ratio_weight: float = 1.0,
    loss_mask: list[float] | None = None,
) -> tuple[ObjectiveOutput, torch.Tensor]:
    """The output for drawn tokens of these ratios, and its gradient by their log-probabilities."""
    count = len(log_ratios)
    rollout = torch.full((count,), -2.0)
    losses = (-rollout - torch.tensor(log_ratios)).requires_grad_()
    nothing = torch.zeros(count)
    targets = Targets(
        loss_mask=torch.ones(count) if loss_mask is None else torch.tensor(loss_mask),
        source=torch.zeros(count, dtype=torch.long),
        policy=PolicyTargets(
            rollout,
            torch.tensor(advantages),
            nothing + policy_weight,
            nothing + ratio_weight,
            nothing,
            torch.zeros(count, dtype=torch.long),
        ),
    )
    output = of(losses[None], targets)
    output.loss.backward()
    assert losses.grad is not None
    return output, -losses.grad


@settings(max_examples=30, deadline=None)
@given(RATIOS, SIGNED)
def test_outside_of_the_interval_a_reward_has_no_gradient_of_either_sign(
    log_ratio: float, advantage: float
) -> None:
    _, gradient = scored(objective(), [log_ratio], [advantage])
    # Not at the very edge, where float32 rounds.
    if not math.log(LOW) - 1e-5 <= log_ratio <= math.log(HIGH) + 1e-5:
        assert gradient.item() == 0
    elif math.log(LOW) + 1e-5 <= log_ratio <= math.log(HIGH) - 1e-5:
        assert gradient.item() == pytest.approx(-advantage * math.exp(log_ratio), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(RATIOS, SIGNED)
def test_the_penalty_brings_back_what_is_masked(log_ratio: float, advantage: float) -> None:
    with_both, _ = scored(objective(0.1), [log_ratio], [advantage])
    without, _ = scored(objective(0.0), [log_ratio], [advantage])
    assert with_both.loss.item() - without.loss.item() == pytest.approx(
        0.1 * log_ratio**2, rel=1e-4, abs=1e-6
    )
    for weight in (0.0, 1.0):
        _, gradient = scored(objective(0.1), [log_ratio], [advantage], policy_weight=weight)
        _, masked = scored(objective(0.0), [log_ratio], [advantage], policy_weight=weight)
        assert (gradient - masked).item() == pytest.approx(0.2 * log_ratio, rel=1e-4, abs=1e-6)


def test_on_its_own_policy_it_is_the_plain_gradient() -> None:
    output, gradient = scored(objective(0.3), [0.0, 0.0], [1.0, -0.5])
    assert gradient.tolist() == [-1.0, 0.5]
    assert output.num_tokens == 2 and not output.sums.requires_grad


@pytest.mark.parametrize("log_ratio", [-500.0, 500.0])
def test_a_ratio_that_exp_cannot_hold_has_a_finite_gradient(log_ratio: float) -> None:
    output, gradient = scored(objective(0.01), [log_ratio], [1.0])
    assert math.isfinite(output.loss.item())
    assert gradient.item() == pytest.approx(0.02 * log_ratio)
    assert torch.isfinite(output.sums).all()


@pytest.mark.parametrize("is_sequence", [False, True])
def test_what_no_longer_counts_has_no_part(is_sequence: bool) -> None:
    of = objective(0.1, is_sequence=is_sequence)
    output, gradient = scored(of, [0.1, 0.2, 5.0], [1.0, 1.0, 1.0], loss_mask=[1.0, 1.0, 0.0])
    alone, _ = scored(of, [0.1, 0.2], [1.0, 1.0])
    assert gradient[2] == 0 and output.num_tokens == 2
    assert output.loss.item() == pytest.approx(alone.loss.item())
    assert torch.allclose(output.sums, alone.sums)


@pytest.mark.parametrize("is_sequence", [False, True])
def test_padding_alone_has_no_loss(is_sequence: bool) -> None:
    of = objective(0.1, is_sequence=is_sequence)
    output, gradient = scored(of, [0.3, 0.1], [0.0, 0.0], loss_mask=[0.0, 0.0])
    assert output.loss.item() == 0 and output.num_tokens == 0 and not gradient.any()
    figures = of.figures(NamedSums.of(of.sum_names, output.sums))
    assert figures == {} and of.loss(NamedSums.of(of.sum_names, output.sums)) == 0.0


def test_whole_responses_are_pulled_to_where_the_reward_is_the_ratio() -> None:
    _, gradient = scored(objective(0.5, is_sequence=True), [1.0, 1.0], [1.0, 1.0])
    assert gradient.tolist() == [0.0, 0.0]
    _, gradient = scored(objective(0.5, is_sequence=True), [1.0, 3.0], [1.0, 1.0])
    assert gradient.tolist() == [1.0, 1.0]
