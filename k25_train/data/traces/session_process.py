"""A Python session in a process of its own: cells come as JSON lines, and what they print goes back.

Its text is what `session.Session` starts Python with; then `main` is called. Nothing of k25_train is there.
What a cell finds is Python, NumPy and Pillow, a folder with images, and the names that earlier cells left.
"""

import ast
import contextlib
import io
import json
import linecache
import os
import resource
import signal
import sys
import traceback
from types import CodeType, FrameType
from typing import Any

MEMORY_BYTES = 2 * 2**30
FILE_BYTES = 64 * 2**20
"""Limits of a session; our choice, far above what a cell about an image needs."""


class Interpreter:
    """Runs cells one after another in one namespace."""

    def __init__(self, timeout_s: float, shown_folder: str) -> None:
        self._timeout_s = timeout_s
        self._shown_folder = shown_folder
        self._names: dict[str, Any] = {}
        self._count = 0

    def begin(self, folder: str) -> None:
        """Forget everything and work in this folder."""
        os.chdir(folder)
        self._names = {"__name__": "__main__", "__builtins__": __builtins__}
        self._count = 0

    def run(self, source: str) -> dict[str, Any]:
        """What a cell prints, then the value of its last expression or the traceback."""
        self._count += 1
        name = f"<cell {self._count}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        out = io.StringIO()
        failed = False
        signal.setitimer(signal.ITIMER_REAL, self._timeout_s)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                self._execute(source, name)
        except BaseException as error:
            failed = True
            out.write(_told(error))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        shown = out.getvalue().replace(os.getcwd(), self._shown_folder)
        return {"output": shown.rstrip("\n"), "failed": failed}

    def _execute(self, source: str, name: str) -> None:
        tree = ast.parse(source, name)
        last = tree.body[-1] if tree.body else None
        if not isinstance(last, ast.Expr):
            self._run_code(compile(tree, name, "exec"))
            return
        del tree.body[-1]
        self._run_code(compile(tree, name, "exec"))
        # As at the prompt, the value of an expression at the end is shown unless it is None.
        kept = ast.Assign([ast.Name("_", ast.Store())], last.value)
        self._run_code(compile(ast.fix_missing_locations(ast.Module([kept], [])), name, "exec"))
        if self._names["_"] is not None:
            print(repr(self._names["_"]))

    def _run_code(self, code: CodeType) -> None:
        exec(code, self._names)


def _told(error: BaseException) -> str:
    """A traceback with the frames of cells alone: those of libraries differ between machines."""
    stack = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in stack if frame.filename.startswith("<cell ")]
    lines = [
        f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}\n    {frame.line}\n'
        for frame in own
    ]
    head = ["Traceback (most recent call last):\n"] if lines else []
    return "".join([*head, *lines, *traceback.format_exception_only(error)])


def _ring(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("the cell ran longer than it may")


def main() -> None:
    """Answer every line of standard input; end when it ends. Arguments: seconds a cell may take, and what
    the folder is called in outputs."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    signal.signal(signal.SIGALRM, _ring)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interpreter = Interpreter(float(sys.argv[1]), sys.argv[2])
    for line in sys.stdin:
        asked = json.loads(line)
        if "folder" in asked:
            interpreter.begin(asked["folder"])
            answer: dict[str, Any] = {}
        else:
            answer = interpreter.run(asked["code"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
