"""One page per idea: files and functions are short, typed, and commented where the algorithms are."""

import ast
from pathlib import Path

import pytest

from tests.helpers.measures import (
    Source,
    comment_density,
    deepest_nesting,
    file_lengths,
    functions_by_length,
    is_typed,
    median,
    percentile,
    public_functions,
    read_source,
)
from tests.helpers.project_sources import CODE, relative, source_files

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 70
MAX_TEST_FUNCTION_LINES = 100
MAX_NESTING = 4
EVERY_FILE = source_files(*CODE, "tests")


def source_of(text: str) -> Source:
    """A file that holds this text."""
    return Source(Path("page.py"), text, ast.parse(text))


@pytest.mark.parametrize("path", EVERY_FILE, ids=relative)
def test_file_and_functions_are_short(path: Path) -> None:
    source = read_source(path)
    assert source.num_lines <= MAX_FILE_LINES, f"split {path.name}"
    is_code = relative(path).startswith(CODE)
    most = MAX_FUNCTION_LINES if is_code else MAX_TEST_FUNCTION_LINES
    assert [each for each in functions_by_length([source]) if each[0] > most] == []
    if is_code:
        assert all(deepest_nesting(function) <= MAX_NESTING for function in source.functions)
        assert [each.name for each in public_functions(source) if not is_typed(each)] == []


def test_files_are_pages() -> None:
    lengths = file_lengths(map(read_source, source_files(*CODE)))
    assert median(lengths) <= 130
    assert percentile(lengths, 0.9) <= 240


def test_long_functions_are_found() -> None:
    body = "    pass\n" * MAX_FUNCTION_LINES
    assert functions_by_length([source_of(f"def f():\n{body}")]) == [(71, "page.py:f")]


def test_a_missing_type_is_found() -> None:
    text = "class A:\n  def f(self, a: int) -> int: ...\n  def g(self, *a): ...\n  def _h(b): ...\n"
    assert [(each.name, is_typed(each)) for each in public_functions(source_of(text))] == [
        ("f", True),
        ("g", False),
    ]


def test_comments_are_counted_per_100_lines_of_code() -> None:
    text = '"""Not code.\n\n# Nor a comment.\n"""\n\na = 1  # next to code\n# Why.\nb = "# none"\n'
    assert comment_density([source_of(text)]) == pytest.approx(50)


def test_nesting_counts_elif_as_one_branch() -> None:
    text = "def f(a):\n  for b in a:\n    if b: pass\n    elif a: pass\n    elif a:\n      while b: pass\n"
    (function,) = source_of(text).functions
    assert deepest_nesting(function) == 3


@pytest.mark.parametrize("folder", ["parallel", "k25_train/training"])
def test_algorithms_have_waypoints(folder: str) -> None:
    """Comments say where in an algorithm one is, and why: at least 4 per 100 lines of code."""
    assert comment_density(map(read_source, source_files(folder))) >= 4
