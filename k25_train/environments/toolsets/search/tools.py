"""The toolset `search`: finds documents of a corpus, and opens them. Option: `index`, its file."""

import asyncio
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from k25_train.environments.environment import Tool
from k25_train.environments.toolsets.base import Place, ToolResult, declared, wrong
from k25_train.environments.toolsets.options import ToolOptions
from k25_train.environments.toolsets.search.index import Index
from k25_train.errors import ConfigError

PAGE = 4_000
"""Characters that `open_document` shows at once. Our choice."""
MOST_HITS = 20
SEARCH = declared(
    "search",
    "Search the documents. Gives numbers, titles and excerpts, the best first.",
    {
        "query": {"type": "string", "minLength": 1, "maxLength": 400, "description": "Words to look for."},
        "k": {"type": "integer", "minimum": 1, "maximum": MOST_HITS, "description": "How many; 5 without."},
    },
    ("query",),
)
OPEN = declared(
    "open_document",
    f"Show a document by its number, {PAGE} characters from `start` on.",
    {"id": {"type": "integer"}, "start": {"type": "integer", "minimum": 0, "description": "0 without."}},
    ("id",),
)


class Search:
    """See `Toolset`."""

    declarations: tuple[Tool, ...] = (SEARCH, OPEN)
    needs_sandbox = False
    is_replayable = True
    files: Mapping[str, bytes] = {}

    def __init__(self, index: Index) -> None:
        self._index = index

    async def open(self, place: Place) -> "Search":
        """It keeps nothing of an attempt."""
        return self

    async def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Search, or open, in a thread."""
        if name == "search":
            return await asyncio.to_thread(self._search, arguments["query"], arguments.get("k", 5))
        return await asyncio.to_thread(self._open, arguments["id"], arguments.get("start", 0))

    async def close(self) -> None:
        """Others use it."""

    def _search(self, query: str, count: int) -> ToolResult:
        hits = self._index.search(query, count)
        lines = [f"[{hit.id}] {hit.title}\n    {hit.excerpt}" for hit in hits]
        return ToolResult(text="\n".join(lines) or "nothing found")

    def _open(self, id: int, start: int) -> ToolResult:
        found = self._index.document(id) if abs(id) < 1 << 62 else None
        if found is None:
            return wrong(f"there is no document {id}")
        shown = found.text[start : start + PAGE]
        left = max(0, len(found.text) - start - PAGE)
        more = f"\n[{left} characters more: start={start + PAGE}]" if left else ""
        return ToolResult(text=f"{found.title}\n\n{shown}{more}")


@cache
def _index(path: str) -> Index:
    """One for all tasks of this process."""
    return Index(Path(path))


def make_search(options: Mapping[str, Any]) -> Search:
    """Raises ConfigError without an index."""
    given = ToolOptions("search", options)
    path = given.take("index", str, "")
    given.end()
    if not path:
        raise ConfigError(
            "toolset search: it needs its option index\n"
            "  -> e.g. index: docs.sqlite, which `python -m k25_train.environments.toolsets.search build "
            "docs.sqlite` writes"
        )
    return Search(_index(path))
