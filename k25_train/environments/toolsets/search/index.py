"""A corpus in one file: documents and their inverted index, SQLite's FTS5.

Built aside and renamed, so that a file is whole or not there; equal documents give an equal index. Any number
of processes read one file; each thread has a connection of its own.
"""

import hashlib
import os
import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from k25_train.environments.toolsets.search.corpus import Document
from k25_train.errors import ConfigError

VERSION = "1"
"""Of what a file looks like."""
TITLE_WEIGHT = 4.0
"""Of a word in a title, relative to one in the text. Our choice."""
EXCERPT_WORDS = 24
_WORD = re.compile(r"\w+")
_TABLES = """
PRAGMA page_size = 4096;
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE documents (id INTEGER PRIMARY KEY, name TEXT UNIQUE, title TEXT, text TEXT);
CREATE VIRTUAL TABLE words USING fts5(title, text, content='documents', content_rowid='id',
    tokenize='porter unicode61');
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A document that was found."""

    id: int
    title: str
    excerpt: str
    """Where the words are in it."""


class Index:
    """An index that is open. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a file that is no index."""
        self._path = path
        self._local = threading.local()
        try:
            facts = dict(self._connection().execute("SELECT name, value FROM facts"))
        except sqlite3.Error as error:
            raise ConfigError(
                f"search index {path}: cannot be read ({error})\n"
                f"  -> build it: python -m k25_train.environments.toolsets.search build {path}"
            ) from error
        if facts.get("version") != VERSION:
            raise ConfigError(
                f"search index {path}: has version {facts.get('version')}, not {VERSION}\n  -> build it again"
            )
        self.digest = facts["digest"]
        """Of all its documents."""
        self.num_documents = int(facts["documents"])

    def _connection(self) -> sqlite3.Connection:
        found: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if found is None:
            uri = f"{self._path.resolve().as_uri()}?mode=ro&immutable=1"
            found = self._local.connection = sqlite3.connect(uri, uri=True)
        return found

    def search(self, query: str, count: int) -> list[Hit]:
        """The best documents with any of the words, by BM25; those with equal scores by their number."""
        words = [f'"{word}"' for word in dict.fromkeys(_WORD.findall(query.lower()))][:32]
        if not words:
            return []
        rows = self._connection().execute(
            f"SELECT rowid, title, snippet(words, 1, '', '', ' … ', {EXCERPT_WORDS}) FROM words "
            "WHERE words MATCH ? ORDER BY bm25(words, ?, 1.0), rowid LIMIT ?",
            (" OR ".join(words), TITLE_WEIGHT, count),
        )
        return [Hit(id=id, title=title, excerpt=" ".join(text.split())) for id, title, text in rows]

    def document(self, id: int) -> Document | None:
        """A document by its number; None for a number that none has."""
        row = self._connection().execute("SELECT name, title, text FROM documents WHERE id = ?", (id,))
        found = row.fetchone()
        return found and Document(name=found[0], title=found[1], text=found[2])

    def documents(self) -> Iterator[tuple[int, Document]]:
        """All, by number: what tasks about the corpus are made of."""
        for id, *rest in self._connection().execute(
            "SELECT id, name, title, text FROM documents ORDER BY id"
        ):
            yield id, Document(name=rest[0], title=rest[1], text=rest[2])


def build(path: Path, documents: Iterable[Document]) -> int:
    """Write an index; returns how many documents it has. Raises ConfigError without any, OSError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    digest, count = hashlib.sha256(), 0
    aside.unlink(missing_ok=True)
    try:
        connection = sqlite3.connect(aside)
        try:
            connection.executescript(_TABLES)
            for count, each in enumerate(documents, 1):
                values = [
                    text.encode(errors="replace").decode() for text in (each.name, each.title, each.text)
                ]
                digest.update("\0".join(values).encode())
                connection.execute("INSERT INTO documents VALUES (?, ?, ?, ?)", (count, *values))
            if not count:
                raise ConfigError("a search index without documents\n  -> name packages that are installed")
            connection.execute("INSERT INTO words(words) VALUES ('rebuild')")
            connection.execute("INSERT INTO words(words) VALUES ('optimize')")
            facts = {"version": VERSION, "digest": digest.hexdigest(), "documents": str(count)}
            connection.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
            connection.commit()
        finally:
            connection.close()
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return count
