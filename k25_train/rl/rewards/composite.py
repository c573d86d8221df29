"""Puts a reward together: weighted rules, a budget of tokens, and rubrics on top.

    verified = Σ weight · reward of each rule / Σ weight
    reward   = verified · (1 - length_penalty · share over the budget) · (1 + Σ bonus · score of each rubric)

Everything multiplies what is verified: a short, or a pleasing, wrong answer gains nothing. Source: K2.5,
section 4.4, names outcome rewards with budget control, and generative reward models on top of verified ones;
how they are put together is not disclosed, our choice.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from k25_train.environments.base import (
    ACCURACY,
    Response,
    Status,
    Task,
    Verdict,
    failed,
    scored,
    unscored,
)
from k25_train.rl.rewards.answer import Answer, answer_of
from k25_train.rl.rewards.faults import ResponseFaultError, TaskFaultError, number_of
from k25_train.rl.rewards.rules.length import over_budget

Check = Callable[[Answer, Any], Awaitable[Verdict]]
"""A rule as a judge applies it: answer and reference in; `unscored` where it could not judge."""
RubricCheck = Callable[[Task, Answer], Awaitable[Verdict]]
"""The same for a rubric set, whose reward is 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a judge consists of."""

    rules: Mapping[str, float]
    """Name of a rule -> weight, above 0."""
    length_penalty: float
    """Share of the reward that is lost at twice the task's `budget_tokens`, 0 to 1."""
    rubrics: Mapping[str, float]
    """Name of a rubric set -> bonus, the share of the reward that a full score adds."""


def with_rubrics(judge: str, source: str) -> str:
    """Name of the judge that puts the rubrics of a source of tasks on top of a judge."""
    return f"{judge} with the rubrics of {source}"


class CompositeJudge:
    """Judges by one recipe."""

    def __init__(
        self, name: str, recipe: Recipe, checks: Mapping[str, Check], rubrics: Mapping[str, RubricCheck]
    ) -> None:
        """`checks` and `rubrics` have at least what the recipe names."""
        self.name = name
        self._recipe = recipe
        self._checks = {rule: checks[rule] for rule in recipe.rules}
        self._rubrics = {rubric: rubrics[rubric] for rubric in recipe.rubrics}

    async def judge(self, task: Task, response: Response) -> Verdict:
        """See `Judge`."""
        # 1. What holds for every rule.
        try:
            answer = answer_of(task, response)
            budget = int(number_of(task.reference, "budget_tokens", 0.0))
        except ResponseFaultError as error:
            return failed(str(error), {"tokens": float(response.num_tokens)})
        except TaskFaultError as error:
            return unscored(str(error))

        # 2. The rules.
        judged = await asyncio.gather(*(check(answer, task.reference) for check in self._checks.values()))
        verified = combined(dict(zip(self._checks, judged, strict=True)), self._recipe.rules)
        verdict = within_budget(verified, response.num_tokens, budget, self._recipe.length_penalty)
        if verdict.status is not Status.SCORED or verdict.reward <= 0 or not self._rubrics:
            return verdict

        # 3. The rubrics, where there is something to add to.
        scores = await asyncio.gather(*(check(task, answer) for check in self._rubrics.values()))
        return on_top(verdict, dict(zip(self._rubrics, scores, strict=True)), self._recipe.rubrics)


def combined(verdicts: Mapping[str, Verdict], weights: Mapping[str, float]) -> Verdict:
    """The weighted mean of rules. One that is unscored leaves the whole unscored; one that failed counts 0,
    and the whole has failed if all have."""
    for name, verdict in verdicts.items():
        if verdict.status is Status.UNSCORED:
            return unscored(_named(name, verdict.reason, len(verdicts)))
    parts = {
        _named(name, part, len(verdicts), "/"): value
        for name, verdict in verdicts.items()
        for part, value in verdict.parts.items()
        if len(verdicts) > 1 or part != ACCURACY
    }
    reason = "; ".join(_reasons(verdicts))
    if all(verdict.status is Status.FAILED for verdict in verdicts.values()):
        return failed(reason, parts)
    total = sum(weights[name] for name in verdicts)
    mean = sum(weights[name] * verdict.reward for name, verdict in verdicts.items()) / total
    return scored(mean, {ACCURACY: mean, **parts}, reason)


def _reasons(verdicts: Mapping[str, Verdict]) -> list[str]:
    return [verdict.reason for verdict in verdicts.values() if verdict.reason]


def _named(name: str, text: str, num_rules: int, between: str = ": ") -> str:
    return text if num_rules == 1 else f"{name}{between}{text}"


def within_budget(verdict: Verdict, num_tokens: int, budget_tokens: int, penalty: float) -> Verdict:
    """The verdict with its reward cut by what the response is over its budget; what is negative stays."""
    if verdict.status is Status.UNSCORED:
        return verdict
    over = over_budget(num_tokens, budget_tokens)
    parts = {**verdict.parts, "tokens": float(num_tokens), "over_budget": over}
    if verdict.status is Status.FAILED:
        return failed(verdict.reason, parts)
    kept = 1 - penalty * over if verdict.reward > 0 else 1.0
    return scored(verdict.reward * kept, parts, verdict.reason)


def on_top(verdict: Verdict, rubrics: Mapping[str, Verdict], bonuses: Mapping[str, float]) -> Verdict:
    """A scored verdict with what rubrics add; unscored if one of them is: the reward is unknown then."""
    for name, rubric in rubrics.items():
        if rubric.status is not Status.SCORED:
            return unscored(rubric.reason or f"rubric {name} gave no score")
    parts = {
        **verdict.parts,
        **{part: value for rubric in rubrics.values() for part, value in rubric.parts.items()},
    }
    bonus = sum(bonuses[name] * rubric.reward for name, rubric in rubrics.items())
    return scored(verdict.reward * (1 + bonus), parts, verdict.reason)
