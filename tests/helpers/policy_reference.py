"""K2.5's equation 1 (report, section 4.4) in float64, token by token as it is printed; no code of ours."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Drawn(NamedTuple):
    """A generated token: the pair by which its log-probability is found, and what it was when drawn."""

    place: tuple[int, int]
    rollout: float
    has_policy_term: bool
    has_penalty: bool


Group = Sequence[tuple[float, Sequence[Drawn]]]
"""Responses to a prompt: the reward of each, and its tokens in all of its branches."""


def equation_1(
    groups: Sequence[Group],
    now: Callable[[tuple[int, int]], float],
    interval: tuple[float, float],
    tau: float,
    by_deviation: bool,
) -> tuple[float, dict[tuple[int, int], float]]:
    """What is minimised, and its derivative by each log-probability."""
    (low, high), loss, slopes = interval, 0.0, dict[tuple[int, int], float]()
    for group in groups:
        mean = sum(reward for reward, _ in group) / len(group)
        deviation = math.sqrt(sum((reward - mean) ** 2 for reward, _ in group) / len(group))
        factor = 1 / (sum(len(tokens) for _, tokens in group) * len(groups))
        for reward, tokens in group:
            advantage = (reward - mean) / (deviation or 1.0) if by_deviation else reward - mean
            for place, rollout, has_policy_term, has_penalty in tokens:
                difference = now(place) - rollout
                ratio = math.exp(difference)
                loss -= factor * min(max(ratio, low), high) * advantage * has_policy_term
                loss += factor * tau * difference**2 * has_penalty
                slope = -ratio * advantage * has_policy_term * (low <= ratio <= high)
                slope += 2 * tau * difference * has_penalty
                slopes[place] = slopes.get(place, 0.0) + factor * slope
    return loss, slopes
