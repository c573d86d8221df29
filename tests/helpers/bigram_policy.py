"""A policy whose tokens depend on the one before alone, by which the objective and its data path are held
against the equation: each log-probability is a number that can be looked up.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from k25_train.config.algorithm import OtherVersions
from k25_train.config.schema import Config
from k25_train.data.batch import Reads
from k25_train.data.context import context_of
from k25_train.data.loader import DataLoader
from k25_train.data.step_batches import stack
from k25_train.data.trajectories.loader import TrajectoryLoader
from k25_train.objectives.base import NamedSums, Objective, total
from k25_train.training.device_batch import to_device
from tests.helpers.policy_reference import Drawn, Group, equation_1
from tests.helpers.step_files import Rollouts

WORDS = Reads(tokens=True, labels=True, pixels=False)


class Found(NamedTuple):
    """What a step comes to."""

    loss: float
    gradient: Tensor
    """[V, V] float64, by the log-probability of each pair of tokens."""
    sums: NamedSums
    """What the objective reports."""


def made_policy(vocab_size: int, seed: int) -> Tensor:
    """[V, V] float64: log-probability of each token (column) after each one (row)."""
    generator = torch.Generator().manual_seed(seed)
    return (0.5 * torch.randn(vocab_size, vocab_size, generator=generator, dtype=torch.float64)).log_softmax(
        1
    )


def through_micro_batches(
    config: Config, data: DataLoader, folder: Path, objective: Objective, policy: Tensor, *, step: int = 0
) -> Found:
    """The objective's sum over micro-batches of all replicas, and over the ranks that share each, divided
    as megatron-core divides it."""
    table = policy.clone().requires_grad_()
    loss, count = torch.zeros((), dtype=torch.float64), 0
    reported: list[Tensor] = []
    loader = TrajectoryLoader(config, data, folder)
    plan = loader.plan(step)
    for replica in range(config.dp):
        stacked = stack(loader.micro_batches(plan, dp_rank=replica, dp_size=config.dp, reads=WORDS))
        for rank in range(config.parallelism.cp):
            held = context_of(rank, config.parallelism.cp).held(stacked)
            for batch in to_device(held, torch.device("cpu")):
                output = objective(-table[batch.tokens.long(), batch.labels.long()][None], batch.targets)
                loss = loss + output.loss
                count += int(output.num_tokens)
                reported.append(output.sums)
    loss = loss / count
    loss.backward()
    assert table.grad is not None
    sums = total(reported, len(objective.sum_names), torch.device("cpu"))
    return Found(float(loss.detach()), table.grad, NamedSums.of(objective.sum_names, sums))


def by_equation(
    rollouts: Rollouts,
    policy: Tensor,
    *,
    low: float,
    high: float,
    penalty: float,
    normalize: bool = False,
    other_versions: OtherVersions = OtherVersions.train,
    current_version: int = 0,
    skip_equal_rewards: bool = False,
) -> tuple[float, Tensor]:
    """The same by `equation_1`, from trajectories as they were made."""
    groups: list[Group] = []
    for group in sorted(set(rollouts.groups.tolist())):
        rewards = rollouts.rewards[rollouts.groups == group].tolist()
        if skip_equal_rewards and len(set(rewards)) == 1:
            continue
        responses = np.flatnonzero(rollouts.groups == group).tolist()
        drawn = [_drawn(rollouts, number, other_versions, current_version) for number in responses]
        groups.append(list(zip(rewards, drawn, strict=True)))
    values = policy.tolist()
    loss, slopes = equation_1(groups, lambda at: values[at[0]][at[1]], (low, high), penalty, normalize)
    gradient = torch.zeros_like(policy)
    for place, slope in slopes.items():
        gradient[place] = slope
    return loss, gradient


def _drawn(rollouts: Rollouts, response: int, other: OtherVersions, current: int) -> Sequence[Drawn]:
    found = []
    for each in rollouts.trajectories:
        if each.response != response:
            continue
        for position in range(1, len(each.tokens)):
            if each.generated[position]:
                is_own = other is OtherVersions.train or int(each.versions[position]) == current
                place = int(each.tokens[position - 1]), int(each.tokens[position])
                rollout = float(each.rollout_logprobs[position])
                found.append(Drawn(place, rollout, is_own, is_own or other is OtherVersions.ratio_only))
    return found
