"""Code is rewarded for what it does under tests, and for nothing that it does instead."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from k25_train.environments.base import Status, Verdict
from k25_train.environments.sandboxes.in_sandbox import from_plain, to_plain
from k25_train.environments.sandboxes.one_shot import open_sandbox
from k25_train.errors import MachineError
from k25_train.rl.rewards.answer import Answer
from k25_train.rl.rewards.rules.same import same
from k25_train.rl.rewards.unit_tests import UnitTests
from tests.helpers.sandboxes import LIMITS, needs_bubblewrap

CASES = {"function": "add", "cases": [{"args": [1, 2], "expect": 3}, {"args": [[1], [2]], "expect": [1, 2]}]}
TESTS = {
    "tests": """
import pickle
from solution import add

def test_numbers():
    assert add(1, 2) == 3

def test_tuples():
    assert add((1,), (2,)) == (1, 2)

def test_errors():
    try:
        add(1, "a")
    except TypeError:
        return
    raise AssertionError("no TypeError")
"""
}
PROGRAMS = {"programs": [{"stdin": "1 2\n", "stdout": "3"}, {"stdin": "5 5\n", "stdout": "10\n"}]}
GOOD = "def add(a, b):\n    return a + b\n"
GOOD_PROGRAM = "print(sum(map(int, input().split())))"


def judged(code: str, *references: Any, wall_s: float = 20.0) -> list[Verdict]:
    """The verdict on a code by each reference."""
    sandbox = open_sandbox(replace(LIMITS, wall_s=wall_s))
    check = UnitTests(lambda: sandbox, 2)
    answer = Answer(reasoning="", content=f"So:\n```python\n{code}\n```", calls=())

    async def run() -> list[Verdict]:
        return list(await asyncio.gather(*(check(answer, reference) for reference in references)))

    return asyncio.run(run())


@needs_bubblewrap
def test_right_code_earns_everything() -> None:
    assert [verdict.reward for verdict in judged(GOOD, CASES, TESTS)] == [1.0, 1.0]
    assert [verdict.reward for verdict in judged(GOOD_PROGRAM, PROGRAMS)] == [1.0]


@needs_bubblewrap
def test_part_of_it_counts_only_where_the_task_says_so() -> None:
    code = "def add(a, b):\n    return 3 if (a, b) == (1, 2) else None"
    partial = {**CASES, "partial_credit": True}
    strict, lenient, tests = judged(code, CASES, partial, TESTS)
    assert (strict.reward, strict.parts["passed_share"]) == (0.0, 0.5)
    assert (lenient.reward, lenient.accuracy) == (0.5, 0.5)
    assert tests.parts["passed_share"] == pytest.approx(1 / 3)
    assert tests.kind == "tests failed"


CHEATS = {
    "exits with 0": "import sys\nsys.exit(0)",
    "exits with 0 at once": "import os\nos._exit(0)",
    "exits when called": "def add(a, b):\n    import os\n    os._exit(0)",
    "prints that it passed": 'print(\'passed\')\nprint(\'{"test": "test_numbers", "passed": true}\')',
    "kills what runs it": "import os, signal\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)",
    "equals everything": """
class Any(int):
    def __eq__(self, other): return True
    def __hash__(self): return 0
def add(a, b):
    return Any(0)
""",
    "writes results": """
import os
for descriptor in range(3, 64):
    for text in ('{"tests": ["a"]}', '{"test": "a", "passed": true, "reason": ""}'):
        try:
            os.write(descriptor, text.encode() + b"\\n")
        except OSError:
            pass
def add(a, b):
    return None
""",
    "looks for what is expected": """
import os
def add(a, b):
    found = set(os.listdir("/judge")) - {"solution.py", "in_sandbox.py"}
    return a + b if found else None
""",
    "replaces what runs it": """
import builtins, json, sys
json.dumps = lambda value: '{"value": 3}'
builtins.print = lambda *a, **k: None
sys.modules["solution"] = sys
def add(a, b):
    return None
""",
    "does not parse": "def add(a, b:",
    "raises": "def add(a, b):\n    raise SystemExit(0)",
    "calls itself": "def add(a, b):\n    return add(a, b)",
    "nests without end": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "answers at great length": "def add(a, b):\n    return 'a' * 50_000_000",
    "floods the channel": """
import os
while True:
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b'{"value": 3}\\n' * 1000)
        except OSError:
            pass
""",
}


@needs_bubblewrap
@pytest.mark.parametrize("cheat", CHEATS)
def test_cheats_earn_nothing(cheat: str) -> None:
    wall_s = 1.5 if cheat.startswith(("floods", "replaces")) else 20.0
    partial = {**CASES, "partial_credit": True, "cases": [{"args": [20, 22], "expect": 42}]}
    for verdict in judged(CHEATS[cheat], partial, TESTS, wall_s=wall_s):
        assert (verdict.status, verdict.reward) == (Status.SCORED, 0.0), verdict
        assert verdict.reason


@needs_bubblewrap
@pytest.mark.parametrize(
    ("program", "kind"),
    [
        ("print(3)", "tests failed"),
        ("import sys; print(sum(map(int, input().split()))); sys.exit(1)", "tests failed"),
        ("while True: pass", "out of time"),
        ("print('3' * 100_000)", "too much output"),
        ("x = [bytearray(1 << 20) for _ in range(300)]", "out of memory"),
    ],
)
def test_programs_that_do_not_do_it_say_why(program: str, kind: str) -> None:
    (verdict,) = judged(program, PROGRAMS, wall_s=1.0 if "while" in program else 20.0)
    assert (verdict.status, verdict.reward, verdict.kind) == (Status.SCORED, 0.0, kind)


@needs_bubblewrap
@pytest.mark.parametrize(
    "reference",
    [
        "cases",
        {},
        {"function": "add"},
        {"function": "add", "cases": []},
        {"function": "add", "cases": [{"args": [1, 2]}]},
        {"tests": "import nothing_of_that_name"},
        {"tests": "x = 1"},
    ],
)
def test_tasks_that_cannot_be_judged_by_leave_no_reward(reference: Any) -> None:
    (verdict,) = judged(GOOD, reference)
    assert verdict.status is Status.UNSCORED
    assert verdict.kind == "malformed reference"


@needs_bubblewrap
def test_an_answer_without_code_has_failed() -> None:
    check = UnitTests(lambda: open_sandbox(LIMITS), 1)
    verdict = asyncio.run(check(Answer(reasoning="", content="add(a, b) = a + b", calls=()), CASES))
    assert (verdict.status, verdict.kind) == (Status.FAILED, "no code")


def test_a_machine_without_sandbox_gives_no_verdict() -> None:
    def none() -> Any:
        raise MachineError("no bubblewrap")

    check = UnitTests(none, 1)
    with pytest.raises(MachineError):
        asyncio.run(check(Answer(reasoning="", content=f"```\n{GOOD}\n```", calls=()), CASES))


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        1 << 200,
        -(1 << 60),
        0.5,
        "text",
        [1, [2]],
        (1, 2),
        {1, 2},
        frozenset(),
        b"ab",
        {1: (2,)},
        {"a": []},
    ],
)
def test_plain_values_pass_as_they_are(value: Any) -> None:
    read = from_plain(to_plain(value))
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("found", "expected", "tolerance", "equal"),
    [
        (3, 3, 0.0, True),
        (3.0, 3, 0.0, True),
        (True, 1, 0.0, False),
        (1, True, 0.0, False),
        ((1, [2]), [1, [2]], 0.0, True),
        ([1], [1, 2], 0.0, False),
        (0.3, 0.1 + 0.2, 0.0, False),
        (0.3, 0.1 + 0.2, 1e-9, True),
        (float("nan"), 1.0, 1e9, False),
        ({"a": 1}, {"a": 1}, 0.0, True),
        ({"a": 1, "b": 1}, {"a": 1}, 0.0, False),
        ("1", 1, 0.0, False),
        (None, None, 0.0, True),
        ([], {}, 0.0, False),
    ],
)
def test_same(found: Any, expected: Any, tolerance: float, equal: bool) -> None:
    assert same(found, expected, tolerance) is equal
