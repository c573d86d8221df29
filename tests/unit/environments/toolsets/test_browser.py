"""Pages are read as a browser shows them, and only those that are served."""

import asyncio
import shutil

import pytest

from k25_train.environments.environment import Services
from k25_train.environments.toolsets import browser
from k25_train.environments.toolsets.base import Place, ToolResult
from k25_train.environments.toolsets.browser import make_browser
from k25_train.environments.toolsets.page_text import page_text
from k25_train.errors import ConfigError, MachineError
from tests.helpers.browser import BROWSER
from tests.helpers.tool_episodes import NoJudges

PAGES = {
    "index.html": "<title>x</title><h1>Prices</h1><p>See <a href='b.html'>more</a></p><p id=p></p>"
    "<script>document.getElementById('p').textContent = 'by ' + 'script'</script>",
}


def used(name: str, page: str, **options: object) -> ToolResult:
    """The result of one call."""
    services = Services(sandboxes=None, judging=NoJudges(), tool_timeout_s=30.0)  # type: ignore[arg-type]

    async def run() -> ToolResult:
        tools = await make_browser({"pages": PAGES, **options}).open(
            Place(task="b/1", sandbox=None, services=services)
        )
        try:
            return await tools.call(name, {"page": page})
        finally:
            await tools.close()

    return asyncio.run(run())


@pytest.mark.skipif(not BROWSER, reason="no chromium on PATH")
def test_a_browser_runs_scripts_and_takes_pictures() -> None:
    assert used("open_page", "index.html").text == "Prices\nSee more <b.html>\nby script"
    shown = used("look_at_page", "/index.html")
    assert shown.media[0].startswith(b"\x89PNG")


def test_other_pages_are_not_there() -> None:
    for page in ("b.html", "../index.html", "file:///etc/passwd", "http://127.0.0.1:1/x"):
        assert used("open_page", page).is_error


def test_without_a_browser_pages_are_read_as_written_unless_one_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(browser, "BROWSERS", ())
    assert used("open_page", "index.html").text == "Prices\nSee more <b.html>"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MachineError, match="firefox is not on this machine"):
        make_browser({"pages": PAGES, "browser": "firefox"})
    with pytest.raises(ConfigError, match="pages and folder"):
        make_browser({})


def test_tables_pictures_and_fields_are_told() -> None:
    text = page_text("<table><tr><td>a<td>b</tr></table><img alt='a cat'><input value=v><style>x</style>")
    assert text == "| a | b\n[picture: a cat][text: v]"
