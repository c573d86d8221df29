"""Documents of a corpus: what the packages that are installed say of themselves. Nothing is imported or run.

METADATA ─► one document: the long description, as its page in a registry has it
NAME.py  ─► one for each module: docstrings of module, classes and functions, by their signatures
"""

import ast
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

MIN_CHARACTERS = 200
"""Shorter documents say nothing. Our choice."""
MAX_CHARACTERS = 60_000
"""Of a document; what is behind is left out. Our choice."""
MAX_SOURCE_BYTES = 1 << 20
"""Longer modules are generated ones. Our choice."""
_SKIPPED = ("tests", "test", "_vendor", "vendored", "testing")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One document."""

    name: str
    """Unique: `PACKAGE/description`, or `PACKAGE/MODULE`."""
    title: str
    """First of what is searched, and shown."""
    text: str
    """The whole."""


def documents(packages: Iterable[str]) -> Iterator[Document]:
    """All documents of packages, in order of their names; all installed ones where none is named."""
    wanted = {_plain(name) for name in packages}
    found = {_plain(each.metadata["Name"] or ""): each for each in distributions()}
    for name in sorted(found):
        if name and (not wanted or name in wanted):
            yield from _of_package(name, found[name])


def missing(packages: Iterable[str]) -> list[str]:
    """Names of packages that are not installed."""
    found = {_plain(each.metadata["Name"] or "") for each in distributions()}
    return [name for name in packages if _plain(name) not in found]


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _of_package(name: str, package: Distribution) -> Iterator[Document]:
    metadata = package.metadata
    about = str(metadata.get_payload() or metadata.get("Description") or "").strip()  # type: ignore[attr-defined]
    title = f"{metadata['Name']} {package.version}: {metadata.get('Summary') or 'no summary'}"
    if len(about) >= MIN_CHARACTERS:
        yield Document(name=f"{name}/description", title=title, text=about[:MAX_CHARACTERS])
    modules = sorted(str(path) for path in package.files or () if str(path).endswith(".py"))
    for module in modules:
        if module.startswith("..") or any(part in _SKIPPED for part in Path(module).parts):
            continue
        text = _docstrings(Path(str(package.locate_file(module))))
        if len(text) >= MIN_CHARACTERS:
            dotted = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            about_it = text.split("\n", 1)[0][:120]
            yield Document(name=f"{name}/{dotted}", title=f"{dotted}: {about_it}", text=text[:MAX_CHARACTERS])


def _docstrings(path: Path) -> str:
    """Docstrings of a module with the signatures that they belong to; empty for what cannot be read."""
    try:
        if path.stat().st_size > MAX_SOURCE_BYTES:
            return ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return ""
    return "\n\n".join(_of_body("", module))


def _of_body(prefix: str, node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        head = _signature(prefix, node)
        if text := ast.get_docstring(node):
            yield f"{head}\n{text}" if head else text
        if isinstance(node, ast.Module | ast.ClassDef):
            inner = f"{prefix}{node.name}." if isinstance(node, ast.ClassDef) else prefix
            for child in node.body:
                if not str(getattr(child, "name", "")).startswith("_"):
                    yield from _of_body(inner, child)


def _signature(prefix: str, node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {prefix}{node.name}"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{prefix}{node.name}({ast.unparse(node.args)})"
    return ""
