"""One page per idea: files and functions stay short."""

import ast
from pathlib import Path

import pytest

from tests.helpers.source import CODE, relative, source_files

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 100
EVERY_FILE = source_files(*CODE, "tests")


def long_functions(source: str) -> list[str]:
    """Names and lengths of the functions that are too long."""
    functions = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    lengths = ((node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in functions)
    return [f"{name}: {length} lines" for name, length in lengths if length > MAX_FUNCTION_LINES]


@pytest.mark.parametrize("path", EVERY_FILE, ids=relative)
def test_file_and_functions_are_short(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= MAX_FILE_LINES, f"split {path.name}"
    assert not long_functions(source)


def test_long_functions_are_found() -> None:
    body = "    pass\n" * MAX_FUNCTION_LINES
    assert long_functions(f"def f():\n{body}") == ["f: 101 lines"]
