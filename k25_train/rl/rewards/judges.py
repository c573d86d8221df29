"""The judges of a run by name, behind one call that never raises and never takes longer than it may.

What a judge raises, and a deadline that it misses, are the judge's fault: the verdict is `unscored`, named by
judge and error. Its caller has it judged again, or drops the group with a record.
"""

import asyncio
import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from k25_train.environments.base import Judge, Response, Task, Verdict, unscored
from k25_train.errors import ConfigError
from k25_train.rl.rewards.answer import Answer
from k25_train.rl.rewards.composite import Check, CompositeJudge, Recipe, RubricCheck
from k25_train.rl.rewards.text_rules import RULES
from k25_train.rl.rewards.workers import RuleWorkers

LENGTH_PENALTY = 0.5
"""Share of the reward that is lost at twice a task's budget; tasks without a budget have no penalty. Source:
not disclosed, our choice."""
RECIPES: Mapping[str, Recipe] = {
    rule: Recipe(rules={rule: 1.0}, length_penalty=LENGTH_PENALTY, rubrics={}) for rule in RULES
}
"""Name of a judge -> what it consists of: one judge for each rule. `open_judges` takes more."""


class Judges:
    """All judges of a run. Belongs to one event loop; to be closed."""

    def __init__(self, judges: Iterable[Judge], timeout_s: float, workers: RuleWorkers) -> None:
        """`timeout_s`: seconds for one verdict, with everything that it waits for."""
        self._judges = {judge.name: judge for judge in judges}
        self._timeout_s = timeout_s
        self._workers = workers
        self.unscored: Counter[str] = Counter()
        """Kind of reason -> how often no verdict could be given, since the start."""

    def check(self, tasks: Iterable[Task]) -> None:
        """Raises ConfigError for a task whose judge there is not."""
        for task in tasks:
            if task.judge not in self._judges:
                known = ", ".join(sorted(self._judges))
                raise ConfigError(
                    f"task {task.key} asks for the judge {task.judge!r}. Use one of: {known}. "
                    "k25_train/rl/rewards/judges.py:RECIPES has them."
                )

    async def judge(self, task: Task, response: Response) -> Verdict:
        """The verdict of the task's judge; raises nothing but CancelledError."""
        verdict = await self._judged(task, response)
        if verdict.reason and verdict.reward != verdict.reward:
            self.unscored[verdict.kind] += 1
        return verdict

    async def _judged(self, task: Task, response: Response) -> Verdict:
        judge = self._judges.get(task.judge)
        if judge is None:
            return unscored(f"no such judge: {task.judge}")
        try:
            return await asyncio.wait_for(judge.judge(task, response), self._timeout_s)
        except TimeoutError:
            return unscored(f"judge timed out: {judge.name} gave no verdict in {self._timeout_s:g} s")
        except Exception as error:
            return unscored(f"judge raised: {judge.name}: {type(error).__name__}: {error}")

    async def close(self) -> None:
        """End what the judges run."""
        await self._workers.close()


def open_judges(
    timeout_s: float,
    num_workers: int,
    checks: Mapping[str, Check] | None = None,
    rubrics: Mapping[str, RubricCheck] | None = None,
    recipes: Mapping[str, Recipe] | None = None,
    others: Iterable[Judge] = (),
) -> Judges:
    """A run's judges: one for each rule, those of `recipes`, and `others`.

    Args:
        timeout_s: seconds for one verdict.
        num_workers: processes that apply rules.
        checks: rules in addition to `RULES`, such as unit tests in a sandbox; each is a judge, too.
        rubrics: rubric sets that recipes may name.
        recipes: further judges by name.
        others: judges that are made otherwise.

    Raises ConfigError for a recipe that names what there is not.
    """
    workers = RuleWorkers(num_workers)
    all_checks = {**{rule: _in_worker(workers, rule) for rule in RULES}, **(checks or {})}
    alone = {
        name: Recipe(rules={name: 1.0}, length_penalty=LENGTH_PENALTY, rubrics={}) for name in checks or {}
    }
    judges: list[Judge] = []
    for name, recipe in {**RECIPES, **alone, **(recipes or {})}.items():
        missing = [*(recipe.rules.keys() - all_checks), *(recipe.rubrics.keys() - (rubrics or {}).keys())]
        if missing or not recipe.rules:
            what = f"names {', '.join(sorted(missing))}, which there is not" if missing else "has no rule"
            raise ConfigError(f"the recipe of judge {name} {what}. Rules: {', '.join(sorted(all_checks))}.")
        judges.append(CompositeJudge(name, recipe, all_checks, rubrics or {}))
    return Judges([*judges, *others], timeout_s, workers)


def _in_worker(workers: RuleWorkers, rule: str) -> Check:
    async def check(answer: Answer, reference: Any) -> Verdict:
        return await workers.apply(rule, answer.content, reference)

    return functools.update_wrapper(check, RULES[rule], assigned=("__doc__",), updated=())
