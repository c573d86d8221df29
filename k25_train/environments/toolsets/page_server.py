"""Serves pages on localhost, to a browser of this machine: GET alone, under a path that cannot be guessed."""

import asyncio
import contextlib
import mimetypes
import secrets
from collections.abc import Mapping
from urllib.parse import quote, unquote, urlsplit

_REQUEST_S = 10.0
"""Seconds in which a request has to have come."""


class PageServer:
    """A server that is up."""

    def __init__(self, pages: Mapping[str, bytes]) -> None:
        """Use `start`."""
        self._pages = pages
        self._key = secrets.token_urlsafe(8)
        self._server: asyncio.Server | None = None

    @classmethod
    async def start(cls, pages: Mapping[str, bytes]) -> "PageServer":
        """Serve pages by their paths, on a free port."""
        made = cls(pages)
        made._server = await asyncio.start_server(made._answer, "127.0.0.1", 0)
        return made

    def url(self, page: str) -> str:
        """Of a page."""
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/{self._key}/{quote(page)}"

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError, asyncio.LimitOverrunError, ValueError):
            async with asyncio.timeout(_REQUEST_S):
                head = await reader.readuntil(b"\r\n\r\n")
                method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
                writer.write(self._content(method, unquote(urlsplit(target).path)))
                await writer.drain()
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def _content(self, method: str, path: str) -> bytes:
        page = path.removeprefix(f"/{self._key}/")
        content = self._pages.get(page) if method == "GET" and page != path else None
        status = "200 OK" if content is not None else "404 Not Found"
        kind = mimetypes.guess_type(page)[0] or "text/html"
        body = content or b""
        charset = "; charset=utf-8" if kind.startswith("text/") else ""
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}{charset}\r\nContent-Length: {len(body)}\r\n"
        head += "Connection: close\r\n\r\n"
        return head.encode() + body

    async def close(self) -> None:
        """Serve no more."""
        assert self._server is not None
        self._server.close()
