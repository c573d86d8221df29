"""From complete groups to the trajectories of a step, with their rewards, advantages and facts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from k25_train.config.algorithm import AlgorithmConfig
from k25_train.data.trajectories.rows import Trajectories, Trajectory
from k25_train.environments.base import Task
from k25_train.rl.advantages import advantages_of, token_weights
from k25_train.rl.figures import verdict_of
from k25_train.rl.toggle import Phase, Toggle, ToggleGroup
from k25_train.rollout.trajectory import Group, Response


def step_rows(
    groups: Sequence[Group],
    tasks: Sequence[Task],
    toggle: Toggle,
    algorithm: AlgorithmConfig,
    *,
    version: int,
) -> Trajectories:
    """The trajectories of all groups of a step.

    Args:
        groups: complete ones, in their order.
        tasks: of each.
        toggle: holds rewards against budgets.
        version: of the weights that the step begins with.
    """
    # 1. Rewards against budgets. Groups without an advantage may be left out, unless there are no others.
    earned = [toggle.rewards(toggle_group(*pair)) for pair in zip(groups, tasks, strict=True)]
    chosen = list(range(len(groups)))
    if algorithm.skip_equal_rewards:
        chosen = [number for number in chosen if np.ptp(earned[number])] or chosen

    # 2. A trajectory for each response, with its reward; then what each of its tokens is trained for.
    trajectories: list[Trajectory] = []
    rewards: list[float] = []
    prompts: list[int] = []
    for prompt, number in enumerate(chosen):
        group, task = groups[number], tasks[number]
        for sample, (response, reward) in enumerate(zip(group.responses, earned[number], strict=True)):
            facts = _facts(group, sample, response, reward)
            trajectories += _trajectories(len(rewards), task, group, response, facts)
            rewards.append(reward)
            prompts.append(prompt)
    rows, of_prompts = Trajectories.of(trajectories), np.array(prompts)
    found = token_weights(
        advantages_of(np.array(rewards), of_prompts, normalize=algorithm.normalize_advantages),
        of_prompts,
        responses=rows.responses,
        offsets=rows.offsets,
        generated=rows.generated,
        versions=rows.versions,
        current_version=version,
        other_versions=algorithm.other_versions,
        skip_equal_rewards=algorithm.skip_equal_rewards,
    )
    return rows.weighted(found.advantages, found.policy_weights, found.ratio_weights)


def toggle_group(group: Group, task: Task) -> ToggleGroup:
    """A complete group as Toggle sees it."""
    verdicts = [verdict_of(response) for response in group.responses]
    return ToggleGroup(
        problem=task.problem or task.key,
        phase=Phase(group.stamp["phase"]),
        rewards=[verdict.reward for verdict in verdicts],
        accuracies=[verdict.accuracy for verdict in verdicts],
        num_tokens=[len(response.token_ids) for response in group.responses],
    )


def _trajectories(
    number: int, task: Task, group: Group, response: Response, facts: dict[str, Any]
) -> list[Trajectory]:
    """A trajectory for each branch of a response that drew something; what branches share, the first of them
    trains."""
    several = len(response.branches) > 1
    return [
        Trajectory(
            name=f"{task.key}#{facts['sample']}" + (f", branch {index}" if several else ""),
            response=number,
            tokens=branch.token_ids,
            generated=branch.own,
            rollout_logprobs=branch.logprobs,
            versions=branch.versions,
            media=tuple(group.media[digest] for digest in branch.media),
            facts=facts | ({"branch": index, "shared": branch.num_shared} if several else {}),
        )
        for index, branch in enumerate(response.branches)
        if branch.own.any()
    ]


def _facts(group: Group, sample: int, response: Response, reward: float) -> dict[str, Any]:
    """What else a step file keeps of a response: `reward` is the judge's, `trained_reward` after budgets."""
    verdict = verdict_of(response).as_json()
    reason = response.ended
    return {
        "group": group.number,
        "task": group.task,
        "sample": sample,
        "epoch": group.epoch,
        "phase": group.stamp["phase"],
        "finish_reason": reason.value if reason else None,
        "turns": response.num_turns,
        "attempt": response.attempt,
        "trained_reward": reward,
        **verdict,
    }
