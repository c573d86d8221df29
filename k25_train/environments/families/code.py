"""Functions to be written into a file, held against hidden unit tests.

    steps drawn ─► description + examples ─► solution.py ─► hidden cases, in another sandbox ─► 1 if all hold

A function takes a list of integers through a few steps. Its cases are values: what the agent's code prints,
or how it exits, says nothing.
"""

import random
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import NamedTuple

from k25_train.environments.base import Task
from k25_train.environments.families.tooled import FILES, SHELL, run_shell, tooled, write_file
from k25_train.environments.family import Family, Options, Script, read_names, say, script

HARDEST = 4
NUM_CASES = 12
NUM_EXAMPLES = 2
FILE = "solution.py"
_MOST_DRAWS = 100


class _Operation(NamedTuple):
    description: str
    """With `{k}` for its number."""
    code: str
    """Expression of `xs` and `{k}`."""
    function: Callable[[list[int], int], list[int]]
    """What the expression is worth."""
    numbers: range
    """What `k` may be."""


OPERATIONS = (
    _Operation("add {k} to each number", "[x + {k} for x in xs]",
               lambda xs, k: [x + k for x in xs], range(1, 50)),
    _Operation("multiply each number by {k}", "[x * {k} for x in xs]",
               lambda xs, k: [x * k for x in xs], range(2, 10)),
    _Operation("subtract each number from {k}", "[{k} - x for x in xs]",
               lambda xs, k: [k - x for x in xs], range(1, 50)),
    _Operation("keep the numbers that {k} divides", "[x for x in xs if x % {k} == 0]",
               lambda xs, k: [x for x in xs if x % k == 0], range(2, 5)),
    _Operation("keep the numbers above {k}", "[x for x in xs if x > {k}]",
               lambda xs, k: [x for x in xs if x > k], range(1, 20)),
    _Operation("leave the first {k} numbers out", "xs[{k}:]",
               lambda xs, k: xs[k:], range(1, 4)),
    _Operation("keep every number at an index that {k} divides, from index 0", "xs[::{k}]",
               lambda xs, k: xs[::k], range(2, 4)),
    _Operation("replace each number by its remainder modulo {k}", "[x % {k} for x in xs]",
               lambda xs, k: [x % k for x in xs], range(3, 20)),
    _Operation("reverse the order", "xs[::-1]", lambda xs, k: xs[::-1], range(1)),
    _Operation("sort in ascending order", "sorted(xs)", lambda xs, k: sorted(xs), range(1)),
    _Operation("replace each number by its square", "[x * x for x in xs]",
               lambda xs, k: [x * x for x in xs], range(1)),
    _Operation("keep each distinct number once, at its first place", "list(dict.fromkeys(xs))",
               lambda xs, k: list(dict.fromkeys(xs)), range(1)),
    _Operation("replace each number by the sum of all up to and including it",
               "[sum(xs[: i + 1]) for i in range(len(xs))]",
               lambda xs, k: list(accumulate(xs)), range(1)),
)  # fmt: skip
"""That the two columns agree, the solutions' verdicts show."""


class Function(NamedTuple):
    """What is to be written."""

    steps: tuple[tuple[int, int], ...]
    """Index into `OPERATIONS`, and its number, in order."""
    inputs: tuple[tuple[int, ...], ...]
    """Arguments of examples, and behind them of hidden cases."""


class Code(Family[Function]):
    """Functions; those with equally many steps are one problem."""

    name = "code"

    def __init__(self, options: Mapping[str, str]) -> None:
        """Options: `difficulty` (steps, a range up to 4), `tools` (files, shell, or both), `wrong`. Raises
        ConfigError."""
        given = Options(self.name, options)
        self._difficulty = given.difficulty(HARDEST)
        rule = "must be files, shell, or both with a comma"
        self._tools = given.take("tools", f"{FILES},{SHELL}", read_names((FILES, SHELL)), rule)
        self.wrong = given.wrong()
        given.end()

    def draw(self, rng: random.Random) -> Function:
        """See `Family`: what neither examples nor a step less explain."""
        while True:
            steps = []
            for _ in range(rng.choice(self._difficulty)):
                index = rng.randrange(len(OPERATIONS))
                steps.append((index, rng.choice(OPERATIONS[index].numbers)))
            inputs = tuple(
                tuple(rng.randrange(-20, 60) for _ in range(rng.randint(4, 9))) for _ in range(NUM_CASES)
            )
            function = Function(tuple(steps), inputs)
            if _is_needed(function):
                return function

    def asked(self, content: Function) -> object:
        """See `Family`: the function, with whatever inputs."""
        return content.steps

    def make(self, key: str, content: Function) -> Task:
        """See `Family`."""
        steps = "".join(
            f"{number}. {OPERATIONS[index].description.format(k=k)}\n"
            for number, (index, k) in enumerate(content.steps, 1)
        )
        examples = "".join(
            f"f({list(xs)}) == {result_of(content.steps, xs)}\n" for xs in content.inputs[:NUM_EXAMPLES]
        )
        cases = [
            {"args": [list(xs)], "expect": result_of(content.steps, xs)}
            for xs in content.inputs[NUM_EXAMPLES:]
        ]
        return tooled(
            key=key,
            family=self.name,
            prompt=(
                f"Write {FILE} with a Python function f(xs). It takes a list of integers and returns the "
                f"list that results from these steps:\n{steps}Examples:\n{examples}"
            ),
            toolsets={name: {} for name in self._tools},
            files={},
            reference={"file": FILE, "function": "f", "cases": cases},
            judge="unit_tests",
            problem=f"{self.name}/{len(content.steps)}",
        )

    def solve(self, content: Function) -> Script:
        """See `Family`."""
        return self._written(source_of(content.steps))

    def cheats(self, content: Function) -> Mapping[str, Script]:
        """See `Family`."""
        shown = {xs: result_of(content.steps, xs) for xs in content.inputs[:NUM_EXAMPLES]}
        liar = "class Same(list):\n    def __eq__(self, other):\n        return True\n"
        return {
            "claim": (say("Done."),),
            "identity": self._written("def f(xs):\n    return xs\n"),
            "examples alone": self._written(f"def f(xs):\n    return {shown}.get(tuple(xs), xs)\n"),
            "equal to everything": self._written(f"{liar}def f(xs):\n    return Same()\n"),
            "early exit": self._written("import os\nprint('12 passed')\nos._exit(0)\n"),
        }

    def _written(self, source: str) -> Script:
        if FILES in self._tools:
            return script(write_file(FILE, source), say("Done."))
        return script(run_shell(f"cat > {FILE} << 'END'\n{source}END"), say("Done."))


def source_of(steps: tuple[tuple[int, int], ...]) -> str:
    """The function as Python."""
    lines = [f"    xs = {OPERATIONS[index].code.format(k=k)}\n" for index, k in steps]
    return f"def f(xs):\n{''.join(lines)}    return xs\n"


def result_of(steps: tuple[tuple[int, int], ...], xs: tuple[int, ...]) -> list[int]:
    """What the function gives."""
    values = list(xs)
    for index, k in steps:
        values = OPERATIONS[index].function(values, k)
    return values


def _is_needed(function: Function) -> bool:
    """Whether each step changes what comes out of the hidden cases, so that no shorter function does."""
    hidden = function.inputs[NUM_EXAMPLES:]
    whole = [result_of(function.steps, xs) for xs in hidden]
    for left_out in range(len(function.steps)):
        steps = function.steps[:left_out] + function.steps[left_out + 1 :]
        if [result_of(steps, xs) for xs in hidden] == whole:
            return False
    return any(result != list(xs) for result, xs in zip(whole, hidden, strict=True))
