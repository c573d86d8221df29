"""Measures of source text: lengths, types, docstrings, comments and words; nothing is imported."""

import ast
import io
import re
import statistics
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef

BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
"""Statements that nest what is in them."""

GERMANISMS = re.compile(
    r"\b((?<!-)stands?(?!-| (?:for|in)\b)|besides?|anew|let go|lets go|under way|mend(?:s|ed)?)\b",
    re.IGNORECASE,
)
"""Words that the prose of this project was full of, where English has others."""

SHORTEST_FILE = 6
"""Lines from which on a file counts: an empty `__init__.py` is no page."""


@dataclass(frozen=True, slots=True)
class Source:
    """One parsed Python file."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def num_lines(self) -> int:
        """Lines of the file."""
        return self.text.count("\n")

    @property
    def functions(self) -> list[Function]:
        """Functions and methods, nested ones included."""
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]


@cache
def read_source(path: Path) -> Source:
    """Parse a file, once."""
    text = path.read_text()
    return Source(path, text, ast.parse(text))


def num_lines(function: Function) -> int:
    """Lines of a function, without its decorators."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def functions_by_length(sources: Iterable[Source]) -> list[tuple[int, str]]:
    """(lines, file and name) of every function, the longest first."""
    found = [
        (num_lines(each), f"{source.path.name}:{each.name}")
        for source in sources
        for each in source.functions
    ]
    return sorted(found, reverse=True)


def file_lengths(sources: Iterable[Source]) -> list[int]:
    """Lines of the files that count, ascending."""
    return sorted(source.num_lines for source in sources if source.num_lines >= SHORTEST_FILE)


def percentile(values: Sequence[int], share: float) -> int:
    """The value that `share` of the ascending values do not exceed."""
    return values[min(len(values) - 1, int(share * len(values)))]


def median(values: Sequence[int]) -> float:
    """The middle value, or the mean of the two in the middle."""
    return statistics.median(values)


def public_functions(source: Source) -> Iterator[Function]:
    """Functions and methods of classes whose names have no leading underscore; special methods count."""
    bodies: list[Sequence[ast.stmt]] = [source.tree.body]
    bodies += [
        node.body for node in source.tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"
    ]
    for body in bodies:
        yield from (
            node
            for node in body
            if isinstance(node, Function) and (node.name[0] != "_" or node.name.startswith("__"))
        )


def is_typed(function: Function) -> bool:
    """Whether every argument and what is returned have an annotation."""
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    arguments += [each for each in (given.vararg, given.kwarg) if each is not None]
    named = [each for number, each in enumerate(arguments) if number or each.arg not in ("self", "cls")]
    return function.returns is not None and all(each.annotation is not None for each in named)


def has_docstring(function: Function) -> bool:
    """Whether a docstring says what the function does; special methods say it by their name."""
    return function.name.startswith("__") or ast.get_docstring(function) is not None


def comment_density(sources: Iterable[Source]) -> float:
    """Lines that are a comment alone, per 100 lines of code; lines of docstrings are neither."""
    num_comments = num_code = 0
    for source in sources:
        comments, code = comment_and_code_lines(source)
        num_comments += comments
        num_code += code
    return 100 * num_comments / max(num_code, 1)


def comment_and_code_lines(source: Source) -> tuple[int, int]:
    """(lines that are a comment alone, lines of code) of one file."""
    in_strings = {
        line
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = source.text.splitlines()
    rest = [line.strip() for number, line in enumerate(lines, start=1) if number not in in_strings]
    comments = sum(line.startswith("#") for line in rest)
    return comments, sum(bool(line) for line in rest) - comments


def deepest_nesting(function: Function) -> int:
    """How many blocks lie within each other at most."""
    return max((_depth(statement) for statement in function.body), default=0)


def _depth(node: ast.AST) -> int:
    if isinstance(node, Function | ast.ClassDef):
        return 0
    inner = max((_depth(child) for child in ast.iter_child_nodes(node)), default=0)
    # `elif` is a second branch of the same block, and parsed as an `if` within its `else`.
    if isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If):
        inner = max([_depth(node.orelse[0]) - 1, *(_depth(child) for child in node.body)])
    return inner + isinstance(node, BLOCKS)


def tests_for_none(source: Source) -> int:
    """Lines with `is None` or `is not None`."""
    return sum("is None" in line or "is not None" in line for line in source.text.splitlines())


def prose_of(source: Source) -> Iterator[str]:
    """Docstrings and comments of a file."""
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(source.tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node.value.value


def germanisms_in(texts: Iterable[str]) -> int:
    """How often the words are used."""
    return sum(len(GERMANISMS.findall(text)) for text in texts)
