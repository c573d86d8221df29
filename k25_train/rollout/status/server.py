"""Serves the status page, the snapshot and the metrics on localhost.

/               for people          /snapshot.json    for programs          /metrics    for Prometheus
"""

import time
from collections import deque
from collections.abc import Awaitable, Callable

from aiohttp import web

from k25_train.errors import MachineError
from k25_train.rollout.manager.snapshot import Snapshot
from k25_train.rollout.status.page import page
from k25_train.rollout.status.prometheus import CONTENT_TYPE, metrics_text

HOST = "127.0.0.1"
"""It says what a run does, and is for those who have an account on its machine."""
RELOAD_S = "2"
"""Seconds until a browser loads the page again. Our choice."""
RATE_S = 10.0
"""Seconds over which the page's rates are taken. Our choice."""
CLOSING_S = 1.0
"""Seconds that open connections get to end."""


class StatusServer:
    """Of one run; on the event loop that starts it."""

    def __init__(self, title: str, look: Callable[[], Awaitable[Snapshot]]) -> None:
        """
        Args:
            title: names the run.
            look: how its rollouts are now.
        """
        self._title, self._look = title, look
        self._seen: deque[tuple[float, Snapshot]] = deque()
        self._runner: web.AppRunner | None = None
        self.port = 0
        """Where it listens; 0 before `start`."""

    async def start(self, port: int | None) -> None:
        """Listen; `port` 0 is a free one, None for nowhere. Raises `MachineError` where it is taken."""
        if port is None:
            return
        app = web.Application()
        app.add_routes(
            [
                web.get("/", self._page),
                web.get("/snapshot.json", self._snapshot),
                web.get("/metrics", self._metrics),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=CLOSING_S)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, HOST, port).start()
        except OSError as error:
            await self.close()
            raise MachineError(
                f"rollout.manager.status_port={port}: cannot be listened on ({error.strerror or error}); "
                "name a free one, or null for no status page"
            ) from error
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        """Listen no more. Twice is as once."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _page(self, _: web.Request) -> web.Response:
        seen, now = await self._look(), time.monotonic()
        self._seen.append((now, seen))
        while len(self._seen) > 1 and now - self._seen[1][0] >= RATE_S:
            self._seen.popleft()
        text = page(self._title, seen, self._seen[0][1])
        return web.Response(text=text, content_type="text/html", headers={"Refresh": RELOAD_S})

    async def _snapshot(self, _: web.Request) -> web.Response:
        return web.json_response((await self._look()).to_json())

    async def _metrics(self, _: web.Request) -> web.Response:
        body = metrics_text(await self._look()).encode()
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})
