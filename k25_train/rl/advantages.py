"""From rewards of groups to what each token is trained for. Pure; numpy only.

K2.5's equation 1 is, for one prompt with K responses of N generated tokens together,

    (1/N) Σ_j Σ_i  clip(ρ_ji, α, β) · (r_j - mean r) - τ (log ρ_ji)²

and the step's objective is its mean over prompts. N is of all generated tokens of the K responses, those
included that are masked: whether a token trains must not change what the others weigh. As megatron-core
divides by the step's G generated tokens, each token of a prompt weighs G / (N · prompts), 1 on average.

A response may be in several trajectories: branches that share its beginning, or parts cut by a tool that
rewrote the context. It has one reward, counts once in K and in the mean, and its trajectories share N.

Shapes: J responses, G groups, R trajectories, T tokens of all of them.
"""

from dataclasses import dataclass

import numpy as np

from k25_train.config.algorithm import OtherVersions
from k25_train.data.mix.ragged import sums_of
from k25_train.errors import TrainingError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Advantages:
    """Rewards of a step, as they are trained for."""

    of_responses: np.ndarray
    """[J] float64: reward less the mean of its group."""
    is_equal: np.ndarray
    """[G] bool: whether all responses of the group earned the same, so that it has no advantage."""


def advantages_of(rewards: np.ndarray, groups: np.ndarray, *, normalize: bool) -> Advantages:
    """Compare each reward with those of its group, of whatever size.

    Args:
        rewards: [J] float, one for each response.
        groups: [J] int, number of its group, from 0 without a gap.
        normalize: whether advantages are divided by the standard deviation of the group's rewards (of the
            population), as GRPO does. A group of equal rewards has advantages of 0 either way.

    Raises `TrainingError` for a reward that is no finite number: unscored responses have no place here.
    """
    if not np.isfinite(rewards).all():
        number = int(np.flatnonzero(~np.isfinite(rewards))[0])
        raise TrainingError(
            f"the reward of response {number} (group {groups[number]}) is {rewards[number]}: an unscored "
            "response has to be judged again, or its group dropped, before it trains"
        )
    values = rewards.astype(np.float64)
    sizes = np.bincount(groups)
    lowest, highest = np.full(len(sizes), np.inf), np.full(len(sizes), -np.inf)
    np.minimum.at(lowest, groups, values)
    np.maximum.at(highest, groups, values)
    is_equal = lowest == highest
    # Less the lowest one, whose rounding would make advantages of equal rewards.
    above = values - lowest[groups]
    found = above - (np.bincount(groups, weights=above) / sizes)[groups]
    if normalize:
        deviations = np.sqrt(np.bincount(groups, weights=found**2) / sizes)
        found = np.divide(found, deviations[groups], out=np.zeros_like(found), where=~is_equal[groups])
    return Advantages(of_responses=found, is_equal=is_equal)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenWeights:
    """What each token is trained for: columns of a step's file (`data/trajectories`)."""

    advantages: np.ndarray
    """[T] float32."""
    policy_weights: np.ndarray
    """[T] float32."""
    ratio_weights: np.ndarray
    """[T] float32."""
    num_prompts: int
    """Groups that count in the mean over prompts."""


def token_weights(
    advantages: Advantages,
    groups: np.ndarray,
    *,
    responses: np.ndarray,
    offsets: np.ndarray,
    generated: np.ndarray,
    versions: np.ndarray,
    current_version: int,
    other_versions: OtherVersions,
    skip_equal_rewards: bool,
) -> TokenWeights:
    """Weigh the tokens of all trajectories of a step.

    Args:
        groups: [J], as of `advantages_of`.
        responses: [R] int: which response each trajectory is of.
        offsets: [R + 1] int: where each begins.
        generated: [T] bool.
        versions: [T] int: version of the weights that drew a token.
        current_version: that of the weights that the step begins with, number of the step before.
        other_versions: what becomes of tokens of other versions.
        skip_equal_rewards: groups of equal rewards get no weight, nor count as prompts. Their tokens still
            count in G: leave their trajectories out of the file, or let them weigh nothing.

    A group without a generated token has nothing to weigh, and does not count as a prompt.
    """
    # 1. Generated tokens of each group, N, and of the step.
    group_of = groups[responses]
    per_trajectory = sums_of(generated.astype(np.int64), offsets)
    per_group = np.bincount(group_of, weights=per_trajectory, minlength=len(advantages.is_equal))
    counts = per_group > 0
    if skip_equal_rewards:
        counts &= ~advantages.is_equal
    num_prompts = int(counts.sum())

    # 2. The weight of a token of each group; 0 of those that are left out.
    weight_of = np.zeros(len(per_group))
    weight_of[counts] = per_group.sum() / (per_group[counts] * num_prompts)
    lengths = np.diff(offsets)
    weights = np.where(generated, np.repeat(weight_of[group_of], lengths), 0.0)

    # 3. Tokens of other versions.
    is_other = generated & (versions != current_version)
    trains = OtherVersions.train is other_versions
    is_held = trains or OtherVersions.ratio_only is other_versions
    policy = weights if trains else np.where(is_other, 0.0, weights)
    ratio = weights if is_held else np.where(is_other, 0.0, weights)
    of_tokens = np.where(generated, np.repeat(advantages.of_responses[responses], lengths), 0.0)
    return TokenWeights(
        advantages=of_tokens.astype(np.float32),
        policy_weights=policy.astype(np.float32),
        ratio_weights=ratio.astype(np.float32),
        num_prompts=num_prompts,
    )
