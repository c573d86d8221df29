"""Sources of the chat set: conversations of public packages, and functions with what they are asked for."""

import ast
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import yaml

from k25_train.data.smoke_set.sources.archive import Archive
from k25_train.data.smoke_set.sources.base import Archives, slug
from k25_train.data.smoke_set.sources.writing import DJANGO_ARCHIVE
from k25_train.errors import DataError

DIALOGUES_ARCHIVE = Archive(
    package="chatterbot-corpus",
    version="1.3.3",
    file_name="chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
)
MIN_DOCSTRING, MAX_FUNCTION = 30, 1_200
"""Characters of the shortest docstring that asks for a function, and of the longest function. Our choice."""


@dataclass(frozen=True, slots=True)
class Talk:
    """One conversation before it is written."""

    group: str
    """What it is about: conversations of one group are all trained on, or all held out."""
    turns: tuple[str, ...]
    """What user and assistant say in turn, the user first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSource:
    """One source of conversations."""

    name: str
    archives: tuple[Archive, ...]
    """The packages it reads."""
    licence: str
    """SPDX expression of the content used."""
    attribution: str
    """Who made it, in a sentence for LICENSES.md."""
    talks: Callable[[Archives], Iterator[Talk]]


def dialogues(archives: Archives) -> Iterator[Talk]:
    """Conversations of ChatterBot's English corpus, each once; what begins alike is a group.

    Raises DataError, naming the member, for one that is not what the corpus has.
    """
    archive = archives[DIALOGUES_ARCHIVE.package]
    seen: set[tuple[str, ...]] = set()
    for name in archive.names:
        if "/data/english/" not in name or not name.endswith(".yml"):
            continue
        try:
            found = yaml.safe_load(archive.read(name))["conversations"]
            conversations = [tuple(str(turn).strip() for turn in each) for each in found]
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise DataError(
                f"{archive.path}: its member {name} has no conversations ({error!r}); it is not the version "
                "expected."
            ) from error
        for turns in conversations:
            whole = turns[: len(turns) // 2 * 2]
            if not whole or whole in seen or not all(whole):
                continue
            seen.add(whole)
            yield Talk(slug(f"dialogue {whole[0]}"), whole)


def functions(archives: Archives) -> Iterator[Talk]:
    """Functions and methods of Django with a docstring: it asks for them, and the code is the answer.

    A group is a file, by the name that it has in the smoke set, so that what is held out there is held out
    here.
    """
    archive = archives[DJANGO_ARCHIVE.package]
    for name in archive.names:
        path = "/" + name.partition("/")[2]
        if not path.startswith("/django/") or not path.endswith(".py"):
            continue
        source = archive.read(name).decode()
        group = slug(f"django {path}")
        for question, code in _pairs(source, path.strip("/")):
            yield Talk(group, (question, f"```python\n{code}\n```"))


def _pairs(source: str, path: str) -> Iterator[tuple[str, str]]:
    """(request, code) of each function of a file that says enough about itself."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        described = ast.get_docstring(node)
        if described is None or len(described) < MIN_DOCSTRING or len(node.body) < 2:
            continue
        signature = f"{node.name}({ast.unparse(node.args)})"
        code = _without_docstring(node, lines)
        if len(code) <= MAX_FUNCTION:
            yield f"Write the function `{signature}` of `{path}`.\n\n{described}", code


def _without_docstring(node: ast.FunctionDef, lines: list[str]) -> str:
    """The lines of a function as they are written, comments and all, but for its docstring."""
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
    described = node.body[0]
    assert node.end_lineno is not None and described.end_lineno is not None
    kept = lines[first - 1 : described.lineno - 1] + lines[described.end_lineno : node.end_lineno]
    return textwrap.dedent("\n".join(kept)).rstrip()


DIALOGUES = ChatSource(
    name="dialogues",
    archives=(DIALOGUES_ARCHIVE,),
    licence="BSD-3-Clause",
    attribution="Conversations of the ChatterBot corpus, by Gunther Cox and contributors.",
    talks=dialogues,
)
CODE = ChatSource(
    name="code",
    archives=(DJANGO_ARCHIVE,),
    licence="BSD-3-Clause",
    attribution="Functions of Django, by the Django Software Foundation and individual contributors.",
    talks=functions,
)
CHAT_SOURCES = (DIALOGUES, CODE)
