"""The project's source files, and what they import, read without importing anything."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
CODE = ("k25_train", "parallel", "launch")
"""The packages that are shipped."""


def source_files(*folders: str) -> list[Path]:
    """Every Python file below these folders of the checkout."""
    return sorted(path for folder in folders for path in (REPO / folder).rglob("*.py"))


def relative(path: Path) -> str:
    """A file's path from the checkout's root, as tests name it."""
    return str(path.relative_to(REPO))


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere; `from a import b` is `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide what is imported"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def in_test_modules(names: Iterable[str]) -> list[str]:
    """The imported names that are in a test module."""
    return [
        name
        for name in names
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split(".")[1:-1])
    ]
