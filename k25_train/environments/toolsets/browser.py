"""The toolset `browser`: pages that are served on localhost, read with a real browser.

    {"pages": {"index.html": "<h1>…"}}      or {"folder": "site"}, with "browser": "chromium"

`open_page` gives the text of a page after its scripts have run, with its links, and `look_at_page` a picture.
Without a browser on this machine pages are read as they are written, without scripts and pictures, unless
`browser` names one, which then has to be there. The browser reaches the served pages alone.
"""

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from k25_train.environments.environment import EnvironmentFaultError, Tool
from k25_train.environments.toolsets.base import Place, ToolResult, declared, wrong
from k25_train.environments.toolsets.options import ToolOptions
from k25_train.environments.toolsets.page_server import PageServer
from k25_train.environments.toolsets.page_text import page_text
from k25_train.errors import ConfigError, MachineError

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MAX_RUNNING = 4
"""Browsers at once in this process, some 150 MB each. Our choice."""
SCRIPTS_MS = 2_000
"""Virtual time that scripts of a page get. Our choice."""
WINDOW = (1024, 768)
"""Pixels of a picture. Our choice."""
_PAGE = {"type": "string", "description": "Path of the page, e.g. index.html."}
OPEN = declared("open_page", "Show the text of a page, with its links.", {"page": _PAGE}, ("page",))
LOOK = declared("look_at_page", "Show a picture of a page.", {"page": _PAGE}, ("page",))


class Browser:
    """See `Toolset`."""

    needs_sandbox = False
    is_replayable = True
    files: Mapping[str, bytes] = {}

    def __init__(self, pages: Mapping[str, bytes], program: str) -> None:
        """`program` is the path of a browser, empty for none."""
        self._pages = pages
        self._program = program
        self.declarations: tuple[Tool, ...] = (OPEN, LOOK) if program else (OPEN,)

    async def open(self, place: Place) -> "_OpenBrowser":
        """See `Toolset`; pages are served once one is asked for."""
        return _OpenBrowser(self._pages, self._program, place.services.tool_timeout_s, self.declarations)


class _OpenBrowser:
    def __init__(
        self, pages: Mapping[str, bytes], program: str, limit_s: float, declarations: tuple[Tool, ...]
    ) -> None:
        self.declarations = declarations
        self._pages = pages
        self._program = program
        self._limit_s = limit_s
        self._server: PageServer | None = None

    async def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Show a page. Raises `EnvironmentFaultError` for a browser that cannot."""
        page = unquote(urlsplit(arguments["page"]).path).lstrip("/") or "index.html"
        if page not in self._pages:
            return wrong(f"there is no page {page}")
        if not self._program:
            return ToolResult(text=page_text(self._pages[page].decode(errors="replace")))
        if self._server is None:
            self._server = await PageServer.start(self._pages)
        url = self._server.url(page)
        async with _room():
            try:
                if name == "look_at_page":
                    return ToolResult(text=f"{page}:", media=(await self._picture(url),))
                return ToolResult(text=page_text((await self._document(url)).decode(errors="replace")))
            except TimeoutError:
                return wrong(f"[{page} was not there within {self._limit_s:g} s]")

    async def _document(self, url: str) -> bytes:
        with tempfile.TemporaryDirectory(prefix="k25-browser-") as folder:
            return await self._run(folder, "--dump-dom", url)

    async def _picture(self, url: str) -> bytes:
        with tempfile.TemporaryDirectory(prefix="k25-browser-") as folder:
            path = Path(folder) / "picture.png"
            await self._run(folder, f"--screenshot={path}", url)
            return path.read_bytes()

    async def _run(self, folder: str, *words: str) -> bytes:
        """Run the browser; its output. Raises TimeoutError, `EnvironmentFaultError`."""
        process = await asyncio.create_subprocess_exec(
            self._program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
            f"--user-data-dir={folder}/profile", f"--window-size={WINDOW[0]},{WINDOW[1]}",
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
            f"--virtual-time-budget={SCRIPTS_MS}", *words,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            async with asyncio.timeout(self._limit_s):
                output, _ = await process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if process.returncode:
            raise EnvironmentFaultError(f"{self._program} ended with status {process.returncode}")
        return output

    async def close(self) -> None:
        """Serve no more."""
        server, self._server = self._server, None
        if server is not None:
            await server.close()


_ROOMS: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}


def _room() -> asyncio.Semaphore:
    """Of this event loop."""
    loop = asyncio.get_running_loop()
    if loop not in _ROOMS:
        _ROOMS.clear()
        _ROOMS[loop] = asyncio.Semaphore(MAX_RUNNING)
    return _ROOMS[loop]


def make_browser(options: Mapping[str, Any]) -> Browser:
    """Raises ConfigError without pages, MachineError without the browser that is named."""
    given = ToolOptions("browser", options)
    pages, folder = given.take("pages", dict, {}), given.take("folder", str, "")
    named = given.take("browser", str, "")
    given.end()
    if bool(pages) == bool(folder):
        raise ConfigError(
            "toolset browser: it needs one of its options pages and folder\n  -> e.g. folder: site"
        )
    root = Path(folder)
    if folder and not root.is_dir():
        raise ConfigError(f"toolset browser: folder={folder} is none\n  -> name the folder with the pages")
    found = {path: str(text).encode() for path, text in pages.items()} or {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }
    program = next((each for name in ([named] if named else BROWSERS) if (each := shutil.which(name))), "")
    if named and not program:
        raise MachineError(
            f"toolset browser: {named} is not on this machine\n"
            "  -> install it, or leave the option browser out"
        )
    return Browser(found, program)
