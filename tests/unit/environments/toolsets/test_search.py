"""A corpus of what packages say of themselves: built alike, searched, and opened in pages."""

import asyncio
from pathlib import Path

import pytest

from k25_train.environments.toolsets.registry import make_toolset
from k25_train.environments.toolsets.search import __main__ as command
from k25_train.environments.toolsets.search.corpus import documents
from k25_train.environments.toolsets.search.index import Index, build
from k25_train.environments.toolsets.search.tools import PAGE
from k25_train.errors import ConfigError

PACKAGES = ["pillow"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of two packages."""
    found = tmp_path_factory.mktemp("index") / "docs.sqlite"
    assert command.main(["build", str(found), "--packages", *PACKAGES]) == 0
    return found


def test_equal_documents_give_an_equal_file(path: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.sqlite"
    assert build(again, documents(PACKAGES)) == Index(path).num_documents > 20
    assert again.read_bytes() == path.read_bytes()
    assert [each.name for each in tmp_path.iterdir()] == ["again.sqlite"]


def test_the_best_document_comes_first_whatever_is_in_the_query(path: Path) -> None:
    index = Index(path)
    assert "ImageFilter" in index.search("gaussian blur filter radius", 3)[0].title
    for odd in ('"', "a OR (b", "title:x", "NEAR(", "*", "—", "'; DROP TABLE documents; --"):
        index.search(odd, 3)
    assert index.search("?!", 3) == []


def test_documents_are_opened_in_pages(path: Path) -> None:
    tools = make_toolset("search", {"index": str(path)})
    longest = max(Index(path).documents(), key=lambda each: len(each[1].text))

    async def run() -> None:
        opened = await tools.open(None)  # type: ignore[arg-type]
        found = await opened.call("search", {"query": "draw a line", "k": 2})
        assert found.text.count("\n    ") == 2
        number, document = longest
        page = await opened.call("open_document", {"id": number})
        assert document.text[:PAGE] in page.text and f"start={PAGE}" in page.text
        page = await opened.call("open_document", {"id": number, "start": PAGE})
        assert document.text[PAGE : 2 * PAGE] in page.text
        assert (await opened.call("open_document", {"id": 10**30})).is_error

    asyncio.run(run())


def test_what_is_no_index_is_refused_with_how_to_build_one(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no index", encoding="utf-8")
    for name in ("none", "text"):
        with pytest.raises(ConfigError, match="search build"):
            Index(tmp_path / name)
    with pytest.raises(ConfigError, match="index"):
        make_toolset("search", {})
    assert command.main(["build", str(tmp_path / "x"), "--packages", "no-such-package"]) == 2
