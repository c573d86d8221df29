"""What runs within sandboxes for unit tests, as a file of its own: the standard library and nothing of ours.

    python in_sandbox.py serve SOLUTION REQUESTS REPLIES      loads untrusted code, calls its functions
    python in_sandbox.py test TESTS REPLIES REQUESTS RESULTS  runs hidden tests, which call through the other
    python in_sandbox.py program SOLUTION                     becomes the untrusted program

The first two are in different sandboxes: what passes between them are lines of JSON with plain values, so
that untrusted code can neither reach the tests, nor answer with an object that equals everything, nor write a
result.
Capitals are paths, or numbers of open files.
"""

import builtins
import json
import os
import resource
import sys
import types
from collections.abc import Callable
from typing import Any, TextIO

MAX_PROCESSES = 64
OURS = "/judge"
"""Folder of a solution that has no other files next to it."""


class GoneError(Exception):
    """The untrusted code does not answer any more."""


def to_plain(value: Any) -> Any:
    """A value as JSON that `from_plain` reads. Raises TypeError for what is no plain value."""
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if kind is int:
        return value if abs(value) < 1 << 53 else {"int": hex(value)}
    if kind is list:
        return [to_plain(item) for item in value]
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [to_plain(item) for item in value]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is dict:
        return {"dict": [[to_plain(key), to_plain(item)] for key, item in value.items()]}
    raise TypeError(f"{kind.__name__} is no plain value")


def from_plain(value: Any) -> Any:
    """The value that `to_plain` wrote. Raises ValueError or TypeError for anything else."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {from_plain(key): from_plain(item) for key, item in content}
    makers: dict[str, Callable[[Any], Any]] = {
        "int": lambda digits: int(digits, 16),
        "bytes": bytes.fromhex,
        "tuple": lambda items: tuple(map(from_plain, items)),
        "set": lambda items: set(map(from_plain, items)),
        "frozenset": lambda items: frozenset(map(from_plain, items)),
    }
    return makers[kind](content)


def _serve(solution: str, requests: str, replies: str) -> None:
    """Answer every request with a value or the name of an error."""
    with (
        open(int(requests), encoding="utf-8") as asked,
        open(int(replies), "w", encoding="utf-8") as answers,
        open(solution, encoding="utf-8") as source,
    ):
        if os.path.dirname(solution) != OURS:
            # Files that were left next to it; whatever is loaded here has been loaded.
            sys.path.insert(0, os.path.dirname(solution))
        namespace: dict[str, Any] = {"__name__": "solution"}
        exec(compile(source.read(), "solution.py", "exec"), namespace)
        for line in asked:
            request = json.loads(line)
            try:
                function = namespace[request["name"]]
                answer = {"value": to_plain(function(*(from_plain(value) for value in request["arguments"])))}
            except Exception as error:
                answer = {"error": type(error).__name__, "text": str(error)[:400]}
            print(json.dumps(answer), file=answers, flush=True)


class Solution(types.ModuleType):
    """What hidden tests import as `solution`: each name is a function that is called in the other sandbox."""

    def __init__(self, requests: TextIO, replies: TextIO) -> None:
        super().__init__("solution")
        self._requests = requests
        self._replies = replies
        self.was_called = False
        """Whether what happens may be the solution's doing."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self.was_called = True
            request = {"name": name, "arguments": [to_plain(value) for value in arguments]}
            try:
                print(json.dumps(request), file=self._requests, flush=True)
                answer = json.loads(self._replies.readline() or "null")
                if isinstance(answer, dict) and "value" in answer:
                    return from_plain(answer["value"])
            except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
                raise GoneError(f"the solution answers no more: {error}") from error
            if not isinstance(answer, dict) or "error" not in answer:
                raise GoneError("the solution answers no more")
            kind = getattr(builtins, str(answer["error"]), None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                kind = RuntimeError
            raise kind(str(answer.get("text", "")))

        return call


def _test(tests: str, replies: str, requests: str, results: str) -> None:
    """Run every `test_…` function of the hidden tests, and say of each whether it passed."""
    with (
        open(int(results), "w", encoding="utf-8") as out,
        open(int(replies), encoding="utf-8") as answers,
        open(int(requests), "w", encoding="utf-8") as asks,
    ):
        solution = sys.modules["solution"] = Solution(asks, answers)
        namespace: dict[str, Any] = {"__name__": "hidden_tests"}
        try:
            with open(tests, encoding="utf-8") as source:
                exec(compile(source.read(), "hidden_tests.py", "exec"), namespace)
        except GoneError:
            print(json.dumps({"gone": True}), file=out, flush=True)
            return
        except Exception as error:
            if solution.was_called:
                print(json.dumps({"gone": True}), file=out, flush=True)
                return
            print(json.dumps({"broken": f"{type(error).__name__}: {error}"}), file=out, flush=True)
            return
        names = [name for name, value in namespace.items() if name.startswith("test_") and callable(value)]
        print(json.dumps({"tests": names}), file=out, flush=True)
        for name in names:
            try:
                namespace[name]()
                result = {"test": name, "passed": True, "reason": ""}
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"[:400]
                result = {"test": name, "passed": False, "reason": text}
            print(json.dumps(result), file=out, flush=True)


def _program(solution: str) -> None:
    """Become the program."""
    if os.path.dirname(solution) == OURS:
        os.execv(sys.executable, [sys.executable, "-I", "-S", solution])
    # Sees the files that were left next to it.
    os.execv(sys.executable, [sys.executable, "-E", "-s", "-S", "-B", solution])


def main() -> None:
    """See the head of this file."""
    # Binds every user but root, whom a group of processes limits.
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    most = MAX_PROCESSES if hard == resource.RLIM_INFINITY else min(hard, MAX_PROCESSES)
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
    roles: dict[str, Callable[..., None]] = {"serve": _serve, "test": _test, "program": _program}
    roles[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    main()
