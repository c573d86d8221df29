"""A run's judges: three kinds of verdict, each with its reason; workers are killed at their deadline."""

import asyncio
import math
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from k25_train.environments.base import Response, Status, Task, Verdict, scored
from k25_train.errors import ConfigError
from k25_train.rl.rewards.composite import Recipe
from k25_train.rl.rewards.judges import Judges, open_judges
from k25_train.rl.rewards.references import wrong_with_reference
from k25_train.rl.rewards.text_rules import RULES, apply_rule
from k25_train.rl.rewards.workers import RuleWorkers


def task(judge: str = "number", reference: Any = None, thinking: bool = False) -> Task:
    """A task whose answer is 7, unless `reference` says otherwise."""
    return Task(
        key="sums/1",
        family="sums",
        messages=({"role": "user", "content": "3 + 4"},),
        reference={"answer": 7} if reference is None else reference,
        judge=judge,
        thinking=thinking,
    )


def response(text: str, num_tokens: int = 3, ended: bool = True) -> Response:
    """A response of a few tokens."""
    return Response(text=text, num_tokens=num_tokens, ended=ended)


def with_judges[T](use: Callable[[Judges], Awaitable[T]], **more: Any) -> T:
    """What `use` makes of judges, which are closed behind it."""

    async def run() -> T:
        judges = open_judges(**{"timeout_s": 20.0, "num_workers": 2, "places": 2, **more})
        try:
            return await use(judges)
        finally:
            await judges.close()

    return asyncio.run(run())


class OddJudge:
    """Raises, hangs, or makes something impossible."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def judge(self, task: Task, response: Response) -> Verdict:
        """See `Judge`."""
        if self.name == "hangs":
            await asyncio.sleep(3600)
        if self.name == "nan":
            return scored(math.nan, {})
        raise ConnectionError("the engine answered 500")


MALFORMED = "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>"
CALL = "<|tool_call_begin|>{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
RESPONSES = {
    "7<|im_end|>": (Status.SCORED, 1.0, ""),
    "It is\n**Answer:** 7": (Status.SCORED, 1.0, ""),
    "8": (Status.SCORED, 0.0, ""),
    "": (Status.FAILED, 0.0, "empty"),
    " <|im_end|>": (Status.FAILED, 0.0, "empty"),
    "seven": (Status.FAILED, 0.0, "no number"),
    "7 or 8": (Status.FAILED, 0.0, "several numbers"),
    "7<|im_user|>": (Status.FAILED, 0.0, "special token"),
    "1e999999999": (Status.FAILED, 0.0, "huge"),
    "7" * 300_000: (Status.FAILED, 0.0, "huge"),
    "\\boxed{7": (Status.FAILED, 0.0, "no answer"),
    "7" + MALFORMED.format(CALL.format("functions.add:0", '{"a": 1}')): (Status.SCORED, 1.0, ""),
    "7" + MALFORMED.format(""): (Status.FAILED, 0.0, "malformed tool call"),
    "7" + MALFORMED.format(CALL.format("functions.add:0", "{a: 1")): (
        Status.FAILED,
        0.0,
        "malformed tool call",
    ),
    "7" + MALFORMED.format(CALL.format("functions.add:0", "[1]")): (
        Status.FAILED,
        0.0,
        "malformed tool call",
    ),
    "7" + MALFORMED.format(CALL.format("add", "{}")): (Status.FAILED, 0.0, "malformed tool call"),
    "7" + MALFORMED.format(CALL.format("functions.add:0", "[" * 100_000)): (
        Status.FAILED,
        0.0,
        "malformed tool call",
    ),
    "7<|tool_calls_section_begin|>": (Status.FAILED, 0.0, "malformed tool call"),
    "7" + MALFORMED.format("<|tool_call_begin|>functions.add:0"): (Status.FAILED, 0.0, "malformed tool call"),
}


def test_responses_get_the_verdicts_that_they_deserve() -> None:
    async def judged(judges: Judges) -> list[Verdict]:
        return list(await asyncio.gather(*(judges.judge(task(), response(text)) for text in RESPONSES)))

    verdicts = with_judges(judged)
    found = [(verdict.status, verdict.reward, verdict.kind) for verdict in verdicts]
    assert found == list(RESPONSES.values())


@pytest.mark.parametrize(
    ("reference", "text", "reward"),
    [
        ("7", "7", 1.0),
        (7, "7.0", 1.0),
        ("7", "17", 0.0),
        (["Paris", "City of Light"], "**Answer:** paris.", 1.0),
        ("red", "Red", 1.0),
        ("red", "green", 0.0),
    ],
)
def test_a_plain_reference_is_an_answer(reference: Any, text: str, reward: float) -> None:
    assert apply_rule("answer", text, reference).reward == reward
    assert apply_rule("answer", text, reference).status is Status.SCORED


def test_a_response_at_the_limit_has_failed_whatever_it_says() -> None:
    async def judged(judges: Judges) -> Verdict:
        return await judges.judge(task(), response("7", ended=False))

    verdict = with_judges(judged)
    assert (verdict.status, verdict.kind) == (Status.FAILED, "at the limit")


@pytest.mark.parametrize(
    ("text", "status", "kind"),
    [
        ("3 and 4 is 7</think>7<|im_end|>", Status.SCORED, ""),
        ("3 and 4 is 7", Status.FAILED, "endless thought"),
        ("7</think>", Status.FAILED, "empty"),
    ],
)
def test_thoughts_are_no_answers(text: str, status: Status, kind: str) -> None:
    async def judged(judges: Judges) -> Verdict:
        return await judges.judge(task(thinking=True), response(text))

    verdict = with_judges(judged)
    assert (verdict.status, verdict.kind) == (status, kind)


@pytest.mark.parametrize(
    ("judge", "kind"),
    [
        ("raises", "judge raised"),
        ("hangs", "judge timed out"),
        ("nan", "judge raised"),
        ("unknown", "no such judge"),
        ("choice", "malformed reference"),
    ],
)
def test_a_judge_at_fault_leaves_no_reward_and_is_counted(judge: str, kind: str) -> None:
    async def judged(judges: Judges) -> tuple[Verdict, dict[str, int]]:
        return await judges.judge(task(judge), response("7")), dict(judges.unscored)

    odd = [OddJudge(name) for name in ("raises", "hangs", "nan")]
    verdict, counts = with_judges(judged, others=odd, timeout_s=0.2 if judge == "hangs" else 20.0)
    assert verdict.status is Status.UNSCORED
    assert math.isnan(verdict.reward)
    assert verdict.kind == kind
    assert judge in verdict.reason or kind == "malformed reference"
    assert counts == {kind: 1}


class SlowJudge:
    """Takes a while for each response."""

    name = "slow"

    async def judge(self, task: Task, response: Response) -> Verdict:
        """See `Judge`."""
        await asyncio.sleep(0.1)
        return scored(1.0, {})


def test_who_waits_for_a_turn_has_not_timed_out() -> None:
    async def judged(judges: Judges) -> list[Verdict]:
        return list(await asyncio.gather(*(judges.judge(task("slow"), response("7")) for _ in range(12))))

    verdicts = with_judges(judged, others=[SlowJudge()], timeout_s=0.5, num_workers=1)
    assert [verdict.status for verdict in verdicts] == [Status.SCORED] * 12


def test_tasks_with_unknown_judges_are_refused_before_the_run() -> None:
    async def check(judges: Judges) -> None:
        judges.check([task()])
        with pytest.raises(ConfigError, match=r"sums/1 asks for the judge 'nobody'.*number"):
            judges.check([task("nobody")])

    with_judges(check)


REFERENCES: dict[str, list[Any]] = {
    "reasoning_gym": [{"dataset": "gcd", "question": "?", "answer": "3", "metadata": {}}],
    "answer": ["7", 7, ["Paris", "Rome"]],
    "number": [{"answer": 7, "budget_tokens": 100}],
    "text": [{"answers": ["Paris"]}],
    "choice": [{"answer": "B", "choices": "ABCD"}],
    "boxes": [{"boxes": [[0, 0, 1, 1]], "iou_floor": 0.5}, {"boxes": []}],
    "points": [{"points": [[0.5, 0.5]], "sigma": 0.02}],
    "polygons": [{"polygons": [[[0, 0], [1, 0], [1, 1]]]}],
    "ocr": [{"text": "a"}],
    "count": [{"count": 7}],
    "files": [{"files": [{"path": "a", "matches": "^b"}, {"path": "c", "absent": True}], "only": ["a"]}],
    "unit_tests": [
        {"function": "add", "cases": [{"args": [1], "expect": 1}]},
        {"programs": [{"stdin": "1", "stdout": "2"}]},
        {"tests": "from solution import add\n\ndef test_small():\n    assert add(1) == 1\n"},
    ],
}
WRONG_REFERENCES: list[tuple[str, Any]] = [
    ("answer", None), ("answer", {"answer": 7}), ("answer", [7]), ("number", "7"),
    ("number", {"answer": None}), ("number", {"answer": 7, "budget_tokens": "many"}),
    ("text", {"answers": "Paris"}),
    ("choice", {"answer": "E", "choices": "ABCD"}), ("boxes", {"boxes": [[0, 0]]}),
    ("boxes", {"boxes": [], "iou_floor": "half"}), ("points", {"points": [], "sigma": 0}),
    ("polygons", {}), ("ocr", {}), ("count", {"count": 1.5}), ("unit_tests", "add"),
    ("files", {"files": []}), ("files", {"files": [{"path": "a"}]}),
    ("files", {"files": [{"path": "a", "matches": "("}]}),
    ("unit_tests", {"function": "add", "cases": []}), ("unit_tests", {"function": "add", "cases": [{}]}),
    ("unit_tests", {"programs": [{"stdin": "1"}]}), ("unit_tests", {"tests": "def test_small("}),
]  # fmt: skip


def test_references_that_their_judge_can_read_pass() -> None:
    for rule, references in REFERENCES.items():
        for reference in references:
            assert wrong_with_reference(reference, [rule]) == "", (rule, reference)
    assert REFERENCES.keys() == {*RULES, "unit_tests"}


def test_tasks_whose_judge_cannot_read_their_reference_are_refused_before_the_run() -> None:
    async def check(judges: Judges) -> None:
        for judge, reference in WRONG_REFERENCES:
            wrong = replace(task(judge), reference=reference)
            words = rf"task sums/1: its judge '{judge}' cannot read its reference: .*malformed "
            with pytest.raises(ConfigError, match=words):
                judges.check([wrong])

    with_judges(check)


@pytest.mark.parametrize("rules", [{}, {"nothing": 1.0}])
def test_recipes_of_what_there_is_not_are_refused(rules: dict[str, float]) -> None:
    recipe = Recipe(rules=rules, length_penalty=0.0, rubrics={})
    with pytest.raises(ConfigError, match="mine"):
        open_judges(1.0, 1, places=1, recipes={"mine": recipe})


def test_a_rule_that_runs_away_is_killed_and_the_next_one_answered() -> None:
    """The reference makes the rule slow: two million edits are not done in a fiftieth of a second."""

    async def run() -> tuple[Verdict, Verdict]:
        slow, quick = RuleWorkers(1, deadline_s=0.02), RuleWorkers(1)
        try:
            overdue = await slow.apply("ocr", "ab" * 9_000, {"text": "ba" * 90_000})
            slow._deadline_s = 20.0
            return overdue, await slow.apply("ocr", "abc", {"text": "abc"})
        finally:
            await slow.close()
            await quick.close()

    overdue, after = asyncio.run(run())
    assert (overdue.status, overdue.kind) == (Status.UNSCORED, "judge out of time or dead")
    assert after.reward == 1.0


def test_a_verdict_that_nobody_waits_for_ends_its_worker() -> None:
    async def run() -> list[int]:
        workers = RuleWorkers(1, deadline_s=60.0)
        await workers.apply("count", "3", {"count": 3})
        (process,) = workers._idle
        slow = asyncio.create_task(workers.apply("ocr", "ab" * 50_000, {"text": "ba" * 50_000}))
        await asyncio.sleep(0.1)
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        assert workers._idle == []
        return [process.pid]

    (pid,) = asyncio.run(run())
    assert not os.path.exists(f"/proc/{pid}")


def test_no_worker_outlives_its_pool() -> None:
    async def run() -> list[int]:
        workers = RuleWorkers(3)
        await asyncio.gather(*(workers.apply("count", "3", {"count": 3}) for _ in range(12)))
        pids = [process.pid for process in workers._idle]
        await workers.close()
        return pids

    pids = asyncio.run(run())
    assert 1 <= len(pids) <= 3
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
