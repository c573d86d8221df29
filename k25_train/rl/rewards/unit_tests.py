"""Unit tests: code of a response runs in a sandbox, and what it does is judged outside of it.

    cases     {"function": "add", "cases": [{"args": [1, 2], "expect": 3}, …], "tolerance": 0}
    programs  {"programs": [{"stdin": "1 2", "stdout": "3"}, …]}
    tests     {"tests": "from solution import add\\n\\ndef test_small():\\n    assert add(1, 2) == 3\\n"}

With `"file": "solution.py"` the code is what the policy has left under that path, with all the files that it
has left next to it; otherwise the last fenced block of the answer.

Expected values of cases and programs never enter the sandbox; tests run in a second one (`in_sandbox.py`).
Code that prints that it has passed, exits with 0, or kills what runs it has answered nothing, so it earns 0.

`"partial_credit": true` rewards the share of what passed; otherwise all has to pass. Source: K2,
section 3.2, and K2.5 reward code by its tests; everything else is our choice.
"""

import ast
import asyncio
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from k25_train.environments.base import ACCURACY, Verdict, failed, scored, unscored
from k25_train.environments.sandboxes import in_sandbox
from k25_train.environments.sandboxes.base import Ending, Finished
from k25_train.environments.sandboxes.in_sandbox import from_plain, to_plain
from k25_train.environments.sandboxes.one_shot import Sandbox
from k25_train.rl.rewards.answer import Answer
from k25_train.rl.rewards.extraction import last_code
from k25_train.rl.rewards.faults import ResponseFaultError, TaskFaultError, needed, number_of
from k25_train.rl.rewards.rules.same import same

LANGUAGES = ("python", "python3", "py")
_PYTHON = [os.path.realpath(sys.executable), "-I", "-S", "/judge/in_sandbox.py"]
_RUNNER = Path(in_sandbox.__file__).read_bytes()
_SOLUTION = "/judge/solution.py"
_LEFT = "/judge/left"
"""Folder of the files that the policy has left."""
_HIDDEN = re.compile(r"(?:^|/)(?:\.|__pycache__/)")
"""Paths that no code needs: of git, caches and the like."""
_MAX_FILES = 100
"""That one program may consist of. Our choice."""
_NO_TESTS = "malformed reference: it is no object with cases, programs or tests"
_MAX_REPLIES = 4 << 20
"""Bytes that are read from a channel."""


class UnitTests:
    """The rule `unit_tests`, a `Check` of `composite.py`."""

    def __init__(self, sandbox: Callable[[], Sandbox], max_running: int) -> None:
        """`sandbox` is called for each response; `max_running` are judged at once, further ones wait."""
        self._open = sandbox
        # Whole responses: half of the two sandboxes that tests need could wait for ever.
        self._room = asyncio.Semaphore(max_running)

    async def __call__(self, answer: Answer, reference: Any) -> Verdict:
        """The verdict; `failed` without code. Raises MachineError without a working sandbox."""
        async with self._room:
            try:
                return await self._judged(answer, reference)
            except ResponseFaultError as error:
                return failed(str(error))
            except TaskFaultError as error:
                return unscored(str(error))

    async def _judged(self, answer: Answer, reference: Any) -> Verdict:
        if not isinstance(reference, dict):
            raise TaskFaultError(_NO_TESTS)
        if "file" in reference:
            solution, code = f"{_LEFT}/{reference['file']}", _left(answer, str(reference["file"]))
        else:
            block = last_code(answer.content, LANGUAGES)
            solution, code = _SOLUTION, {_SOLUTION: block.encode(errors="replace")}
        files = {**code, "/judge/in_sandbox.py": _RUNNER}
        if "tests" in reference:
            passed, why = await self._tests(solution, files, str(reference["tests"]))
        elif "programs" in reference:
            passed, why = await self._programs(solution, files, _listed(reference, "programs"))
        else:
            passed, why = await self._cases(solution, files, reference)
        share = sum(passed) / len(passed)
        reward = share if reference.get("partial_credit", False) else float(all(passed))
        return scored(reward, {ACCURACY: reward, "passed_share": share}, why)

    async def _cases(
        self, solution: str, files: Mapping[str, bytes], reference: Any
    ) -> tuple[list[bool], str]:
        name, cases = str(needed(reference, "function")), _listed(reference, "cases")
        tolerance = number_of(reference, "tolerance", 0.0)
        expected = [needed(case, "expect") for case in cases]
        calls = [
            json.dumps({"name": name, "arguments": [to_plain(value) for value in _listed(case, "args", 0)]})
            for case in cases
        ]
        requests = _file("\n".join(calls))
        replies, written = os.pipe()
        command = [*_PYTHON, "serve", solution, str(requests), str(written)]
        run = self._open().run(command, files, descriptors=[requests, written])
        finished, lines = await asyncio.gather(run, _read_lines(replies))
        passed = [
            number < len(lines) and _answers(lines[number], value, tolerance)
            for number, value in enumerate(expected)
        ]
        return passed, _why(passed, finished)

    async def _programs(
        self, solution: str, files: Mapping[str, bytes], programs: list[Any]
    ) -> tuple[list[bool], str]:
        passed: list[bool] = []
        why = ""
        for program in programs:
            given, expected = (str(needed(program, key)) for key in ("stdin", "stdout"))
            run = await self._open().run([*_PYTHON, "program", solution], files, given.encode())
            ended_well = run.ending is Ending.EXITED and run.status == 0
            passed.append(ended_well and _trimmed(run.stdout.decode(errors="replace")) == _trimmed(expected))
            why = why or _why(passed, run)
        return passed, why

    async def _tests(self, solution: str, files: Mapping[str, bytes], tests: str) -> tuple[list[bool], str]:
        hidden = {"/judge/in_sandbox.py": _RUNNER, "/judge/hidden_tests.py": tests.encode()}
        (asked, asks), (answered, answers), (results, reports) = os.pipe(), os.pipe(), os.pipe()
        serve = [*_PYTHON, "serve", solution, str(asked), str(answers)]
        test = [*_PYTHON, "test", "/judge/hidden_tests.py", str(answered), str(asks), str(reports)]
        served, tested, lines = await asyncio.gather(
            self._open().run(serve, files, descriptors=[asked, answers]),
            self._open().run(test, hidden, descriptors=[answered, asks, reports]),
            _read_lines(results),
        )
        first: dict[str, Any] = lines[0] if lines else {"tests": ["all"]}
        if not first.get("tests"):
            if "gone" in first:
                return [False], _why([False], served, "the code does not load, or ends the process")
            raise TaskFaultError(
                f"malformed reference: its tests do not load: {first.get('broken', 'none in it')}"
            )
        results_of = {line["test"]: line for line in lines[1:]}
        passed = [bool(results_of.get(name, {}).get("passed")) for name in first["tests"]]
        reason = next((line["reason"] for line in lines[1:] if not line["passed"]), "")
        return passed, _why(passed, served if served.ending is not Ending.EXITED else tested, reason)


def _left(answer: Answer, file: str) -> dict[str, bytes]:
    """The files of a policy where they are judged. Raises ResponseFaultError without the needed one."""
    if file not in answer.files:
        raise ResponseFaultError(f"no code: nothing was left as {file}")
    seen = {path: content for path, content in answer.files.items() if not _HIDDEN.search(path)}
    if len(seen) > _MAX_FILES:
        raise ResponseFaultError(f"too many files: {len(seen)} were left, more than {_MAX_FILES}")
    return {f"{_LEFT}/{path}": content for path, content in {**seen, file: answer.files[file]}.items()}


def read_tests(reference: Any) -> None:
    """Raises TaskFaultError for what is no reference of `unit_tests`; runs nothing."""
    if not isinstance(reference, dict):
        raise TaskFaultError(_NO_TESTS)
    if "tests" in reference:
        try:
            ast.parse(str(reference["tests"]))
        except (SyntaxError, ValueError) as error:
            raise TaskFaultError(f"malformed reference: its tests do not load: {error}") from error
    elif "programs" in reference:
        for program in _listed(reference, "programs"):
            needed(program, "stdin"), needed(program, "stdout")
    else:
        needed(reference, "function")
        number_of(reference, "tolerance", 0.0)
        for case in _listed(reference, "cases"):
            needed(case, "expect"), _listed(case, "args", 0)


def _answers(line: Any, expected: Any, tolerance: float) -> bool:
    """Whether a line of untrusted code holds the value."""
    try:
        return "value" in line and same(from_plain(line["value"]), expected, tolerance)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return False


def _listed(reference: Any, key: str, least: int = 1) -> list[Any]:
    values = needed(reference, key)
    if not isinstance(values, list) or len(values) < least:
        raise TaskFaultError(f"malformed reference: its {key!r} are no list of {least} or more")
    return values


def _trimmed(text: str) -> list[str]:
    """Lines without white space at their ends, and without empty ones behind the last."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _why(passed: list[bool], finished: Finished, reason: str = "") -> str:
    if all(passed):
        return ""
    if finished.ending is not Ending.EXITED:
        return f"{finished.ending}: the code was ended"
    last = finished.stderr.decode(errors="replace").strip().splitlines()[-1:]
    said = reason or " ".join(last)[:200]
    return f"tests failed: {sum(passed)} of {len(passed)} passed" + (f"; {said}" if said else "")


def _file(text: str) -> int:
    """A file without a name that has the text, open at its start."""
    descriptor = os.memfd_create("k25")
    with open(descriptor, "w", encoding="utf-8", closefd=False) as file:
        file.write(text)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


async def _read_lines(descriptor: int) -> list[dict[str, Any]]:
    """The objects that come out of a pipe, one a line, up to the first line that is none; closes it."""
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    pipe = os.fdopen(descriptor, "rb")
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)
    content = b""
    try:
        while len(content) < _MAX_REPLIES and (piece := await reader.read(1 << 16)):
            content += piece
    finally:
        transport.close()
    lines = []
    for line in content.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(value, dict):
            break
        lines.append(value)
    return lines
