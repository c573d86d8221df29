"""Every text file is opened with its encoding named, so that no locale changes what is read or written."""

import ast
from pathlib import Path

import pytest

from tests.helpers.project_sources import CODE, relative, source_files

METHODS = ("read_text", "write_text", "open")
"""Methods of a path that open it."""
OTHER_OPENERS = (
    "toolset", "sandboxes", "self._services.sandboxes", "os", "StoredCheckpoint", "Image", "tarfile", "av",
    "PIL.Image", "data", "self._source", "SourceIndex",
)  # fmt: skip
"""Whose `open` opens something else than a text file."""


def without_encoding(source: str) -> list[int]:
    """Lines of calls that open a text file in the locale's encoding."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and opens_text(node) and not names_encoding(node)
    ]


def opens_text(call: ast.Call) -> bool:
    """Whether a call opens a file or a pipe as text: all that look like it, unless their mode says binary."""
    function = call.func
    if ast.unparse(function).startswith("subprocess."):
        return any(keyword.arg in ("text", "universal_newlines") for keyword in call.keywords)
    if isinstance(function, ast.Name):
        if function.id != "open":
            return False
        modes = call.args[1:2]
    elif isinstance(function, ast.Attribute) and function.attr in METHODS:
        whose = ast.unparse(function.value)
        if whose in OTHER_OPENERS or whose.rpartition(".")[2].endswith("sandboxes"):
            return False
        modes = call.args[:1] if function.attr == "open" else []
    elif isinstance(function, ast.Attribute) and function.attr in ("NamedTemporaryFile", "fdopen"):
        modes = call.args[1:2] if function.attr == "fdopen" else call.args[:1]
        modes = modes or [ast.Constant("r" if function.attr == "fdopen" else "wb")]
    else:
        return False
    modes += [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    return not any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)


def names_encoding(call: ast.Call) -> bool:
    """Whether the call says in which encoding."""
    return any(keyword.arg in ("encoding", None) for keyword in call.keywords)


@pytest.mark.parametrize("path", source_files(*CODE), ids=relative)
def test_text_files_have_an_encoding(path: Path) -> None:
    lines = without_encoding(path.read_text(encoding="utf-8"))
    assert not lines, f"{relative(path)}: name the encoding in lines {lines}"


@pytest.mark.parametrize(
    ("source", "is_caught"),
    [
        ("path.read_text()", True),
        ("path.write_text(text)", True),
        ("open(path)", True),
        ("path.open('a')", True),
        ("os.fdopen(number, 'w')", True),
        ("open(path, 'rb')", False),
        ("path.open('ab', buffering=0)", False),
        ("path.open(mode='rb')", False),
        ("path.read_text(encoding='utf-8')", False),
        ("path.read_text(errors='replace')", True),
        ("os.open(path, flags)", False),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command, encoding='utf-8', errors='replace')", False),
    ],
)
def test_what_is_caught(source: str, is_caught: bool) -> None:
    assert bool(without_encoding(source)) == is_caught
