"""The judges of a run by name, behind one call that never raises and never takes longer than it may.

What a judge raises, and a deadline that it misses, are the judge's fault: the verdict is `unscored`, named by
judge and error. Its caller has it judged again, or drops the group with a record.
"""

import asyncio
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from k25_train.environments.base import Judge, Response, Status, Task, Verdict, failed, unscored
from k25_train.environments.instructions.instructions import with_instructions
from k25_train.environments.sandboxes.command_line import Limits
from k25_train.environments.sandboxes.one_shot import open_sandbox
from k25_train.errors import ConfigError
from k25_train.rl.rewards.answer import Answer, content_of
from k25_train.rl.rewards.composite import Check, CompositeJudge, Recipe, RubricCheck
from k25_train.rl.rewards.faults import ResponseFaultError, TaskFaultError
from k25_train.rl.rewards.references import UNIT_TESTS, wrong_with_reference
from k25_train.rl.rewards.text_rules import RULES, files, handed_over
from k25_train.rl.rewards.unit_tests import UnitTests
from k25_train.rl.rewards.workers import RuleWorkers

LENGTH_PENALTY = 0.5
"""Share of the reward that is lost at twice a task's budget; tasks without a budget have no penalty. Source:
not disclosed, our choice."""
LIMITS = Limits(
    wall_s=10.0,
    cpu_s=10,
    memory_bytes=512 << 20,
    disk_bytes=64 << 20,
    output_bytes=1 << 20,
    processes=32,
)
"""Of code under test. Source: our choice."""


class Judges:
    """All judges of a run. Belongs to one event loop; to be closed."""

    def __init__(
        self,
        judges: Iterable[Judge],
        timeout_s: float,
        places: int,
        workers: RuleWorkers,
        needs: Mapping[str, Callable[[], object]],
        rules: Mapping[str, Iterable[str]],
    ) -> None:
        """A run's judges; `open_judges` makes them.

        Args:
            judges: each under its name.
            timeout_s: seconds for one verdict, from when its turn has come.
            places: responses that are judged at once; further ones wait, thousands at the end of a phase,
                and that is no fault of a judge.
            workers: to be closed with the judges.
            needs: judge -> what to call before the run; raises K25Error where this machine lacks something.
            rules: judge -> the rules that read the references of its tasks.
        """
        self._judges = {judge.name: judge for judge in judges}
        self._timeout_s = timeout_s
        self._room = asyncio.Semaphore(places)
        self._workers = workers
        self._needs = needs
        self._rules = rules
        self.unscored: Counter[str] = Counter()
        """Kind of reason -> how often no verdict could be given, since the start."""

    def check(self, tasks: Iterable[Task]) -> None:
        """Before a run. Raises ConfigError for a task whose judge there is not, or cannot read its reference,
        K25Error for one whose judge cannot judge on this machine."""
        for task in tasks:
            if not task.judge:
                # Its environment judges.
                continue
            if task.judge not in self._judges:
                known = ", ".join(sorted(self._judges))
                raise ConfigError(
                    f"task {task.key} asks for the judge {task.judge!r}. Use one of: {known} "
                    "(k25_train/rl/rewards/README.md)."
                )
            if wrong := wrong_with_reference(task.reference, self._rules.get(task.judge, ())):
                raise ConfigError(
                    f"task {task.key}: its judge {task.judge!r} cannot read its reference: {wrong}. Correct "
                    "it, or leave the task out (k25_train/rl/rewards/README.md)."
                )
            self._needs.get(task.judge, _nothing)()

    async def judge(self, task: Task, response: Response) -> Verdict:
        """The verdict of the task's judge; raises nothing but CancelledError."""
        verdict = await self._judged(task, response)
        if verdict.status is Status.UNSCORED:
            self.unscored[verdict.kind] += 1
        return verdict

    async def _judged(self, task: Task, response: Response) -> Verdict:
        judge = self._judges.get(task.judge)
        if judge is None:
            return unscored(f"no such judge: {task.judge}")
        async with self._room:
            try:
                verdict = await asyncio.wait_for(judge.judge(task, response), self._timeout_s)
                return with_instructions(task, content_of(response), verdict)
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
    *,
    places: int,
    limits: Limits = LIMITS,
    rubrics: Mapping[str, RubricCheck] | None = None,
    recipes: Mapping[str, Recipe] | None = None,
    others: Iterable[Judge] = (),
) -> Judges:
    """A run's judges: one for each rule, those of `recipes`, and `others`.

    Args:
        timeout_s: seconds for one verdict.
        num_workers: processes that apply rules.
        places: responses that are judged at once: more than workers where rubrics wait for a server.
        limits: of each sandbox.
        rubrics: rubric sets that recipes may name.
        recipes: further judges by name.
        others: judges that are made otherwise.

    Raises ConfigError for a recipe that names what there is not.
    """
    workers = RuleWorkers(num_workers)
    sandbox = functools.cache(lambda: open_sandbox(limits))
    checks: dict[str, Check] = {rule: _in_worker(workers, rule) for rule in RULES}
    checks[files.__name__] = _files_in_worker(workers)
    checks[UNIT_TESTS] = UnitTests(sandbox, num_workers)
    alone = {rule: Recipe(rules={rule: 1.0}, length_penalty=LENGTH_PENALTY, rubrics={}) for rule in checks}
    all_recipes = {**alone, **(recipes or {})}
    judges = [_composite(name, recipe, checks, rubrics or {}) for name, recipe in all_recipes.items()]
    needs = {name: sandbox for name, recipe in all_recipes.items() if UNIT_TESTS in recipe.rules}
    rules = {name: recipe.rules for name, recipe in all_recipes.items()}
    return Judges([*judges, *others], timeout_s, places, workers, needs, rules)


def _composite(
    name: str, recipe: Recipe, checks: Mapping[str, Check], rubrics: Mapping[str, RubricCheck]
) -> CompositeJudge:
    missing = sorted((recipe.rules.keys() - checks) | (recipe.rubrics.keys() - rubrics))
    if missing or not recipe.rules:
        what = f"names {', '.join(missing)}, which there is not" if missing else "has no rule"
        raise ConfigError(f"the recipe of judge {name} {what}. Rules: {', '.join(sorted(checks))}.")
    return CompositeJudge(name, recipe, checks, rubrics)


def _in_worker(workers: RuleWorkers, rule: str) -> Check:
    async def check(answer: Answer, reference: Any) -> Verdict:
        return await workers.apply(rule, answer.content, reference)

    return check


def _files_in_worker(workers: RuleWorkers) -> Check:
    async def check(answer: Answer, reference: Any) -> Verdict:
        try:
            content = handed_over(answer.files, reference)
        except ResponseFaultError as error:
            return failed(str(error))
        except TaskFaultError as error:
            return unscored(str(error))
        return await workers.apply(files.__name__, content, reference)

    return check


def _nothing() -> None:
    """A judge that needs nothing."""
