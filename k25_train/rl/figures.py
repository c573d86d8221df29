"""What the row of a step says of its groups, and of an evaluation: rewards, lengths, faults, staleness."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from k25_train.environments import base
from k25_train.environments.base import Status, Verdict
from k25_train.rl.controller import Answered
from k25_train.rl.rewards.monitor import monitor
from k25_train.rollout.trajectory import Ended, Group, Response


def group_figures(groups: Sequence[Group], step: int) -> dict[str, float]:
    """Figures of the complete groups that `step` trains on.

    `reward` and `reward/PART`: means over responses, before budgets. `accuracy`: of answers alone.
    `response_tokens`, and `_p90`: sampled tokens. `failed_share` with `rollout/failed/KIND`: responses at
    fault, and how many by kind. `length_share`, `timeout_share`: those that reached a limit of tokens or
    turns, or of time. `turns`, `tool_calls`, `unread_turns`, `observed_tokens`: means over responses of
    turns, calls of tools, turns that could not be read, and tokens behind the prompt that were not sampled.
    `equal_groups_share`: groups whose responses all earned the same. `staleness`, and `_max`: steps between
    the weights that made a token and those that it trains.
    """
    responses = [response for group in groups for response in group.responses]
    rewards = [group.rewards() for group in groups]
    versions = np.concatenate([response.versions for response in responses])
    staleness = step - 1 - versions
    return {
        **_answered(responses),
        "equal_groups_share": float(np.mean([np.ptp(each) == 0 for each in rewards])),
        "staleness": float(staleness.mean()) if len(staleness) else 0.0,
        "staleness_max": float(staleness.max(initial=0)),
        "rollout/groups": float(len(groups)),
        "rollout/tokens": float(len(versions)),
    }


def sign_figures(groups: Sequence[Group], decode: Callable[[np.ndarray], str]) -> dict[str, float]:
    """`hack/SIGN`: shares of the rewarded responses of complete groups that show a sign of a reward that was
    not earned (`rewards/monitor.py`). `decode`: from the tokens of a response to its text."""
    responses = [response for group in groups for response in group.responses]
    return monitor([(_whole(response, decode), verdict_of(response)) for response in responses])


def evaluation_figures(answers: Sequence[Answered]) -> dict[str, float]:
    """`eval_reward`, `eval_accuracy`, `eval_response_tokens`, `eval_length_share` of held-out tasks."""
    if not answers:
        return {}
    found = _answered([each.response for each in answers])
    names = ("reward", "accuracy", "response_tokens", "length_share", "failed_share")
    return {f"eval_{name}": found[name] for name in names}


def work_figures(counts: Mapping[str, float]) -> dict[str, float]:
    """What `Counts.take` says, as a row has it: `rollout_s`, `judge_s`, `rollout/retried/KIND`."""
    return {
        name if name.endswith("_s") else f"rollout/{name}": value for name, value in sorted(counts.items())
    }


def verdict_of(response: Response) -> Verdict:
    """The verdict of a response of a complete group. Raises ValueError where there is none."""
    if response.verdict is None:
        raise ValueError("a response that was not judged")
    return response.verdict


def _whole(response: Response, decode: Callable[[np.ndarray], str]) -> base.Response:
    return base.Response(
        text=decode(response.last_turn),
        num_tokens=len(response.token_ids),
        ended=response.ended is Ended.STOP,
    )


def _answered(responses: Sequence[Response]) -> dict[str, float]:
    verdicts = [verdict_of(response) for response in responses]
    lengths = np.array([len(response.token_ids) for response in responses], dtype=np.float64)
    at_limit = [response.ended in (Ended.LENGTH, Ended.TURNS) for response in responses]
    failed = Counter(verdict.kind for verdict in verdicts if verdict.status is Status.FAILED)
    parts = sorted({part for verdict in verdicts for part in verdict.parts})
    return {
        "reward": float(np.mean([verdict.reward for verdict in verdicts])),
        **{f"reward/{part}": _mean_of(part, verdicts) for part in parts},
        "accuracy": float(np.mean([verdict.accuracy for verdict in verdicts])),
        "response_tokens": float(lengths.mean()),
        "response_tokens_p90": float(np.percentile(lengths, 90)),
        "failed_share": sum(failed.values()) / len(verdicts),
        **{f"rollout/failed/{kind.replace(' ', '_')}": float(count) for kind, count in failed.items()},
        "length_share": float(np.mean(at_limit)),
        "timeout_share": float(np.mean([each.ended is Ended.TIMEOUT for each in responses])),
        "turns": float(np.mean([each.num_turns for each in responses])),
        "tool_calls": float(np.mean([each.num_calls for each in responses])),
        "unread_turns": float(np.mean([each.num_unread for each in responses])),
        "observed_tokens": float(np.mean([each.num_observed for each in responses])),
    }


def _mean_of(part: str, verdicts: Sequence[Verdict]) -> float:
    """Mean of a part over the verdicts that have it."""
    return float(np.mean([verdict.parts[part] for verdict in verdicts if part in verdict.parts]))
