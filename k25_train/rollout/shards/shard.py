"""One shard: an event loop whose rollouts work for the first rank.

    begin ─► build("module:function", arguments) ─► Rollouts
    work  ─► respond(…) ─► record, record, … ─► done | failed

It ends with its first rank: by the kernel's signal where that is its parent, and when nothing is heard of it.
"""

import asyncio
import contextlib
import ctypes
import importlib
import math
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np

from k25_train.errors import K25Error
from k25_train.rollout.engines.base import EngineError, Generated, Request
from k25_train.rollout.records import Record
from k25_train.rollout.response_records import apply_record
from k25_train.rollout.shards.link import ShardLink
from k25_train.rollout.shards.messages import (
    generated_of,
    record_message,
    request_message,
    work_of,
)
from k25_train.rollout.work import Rollouts, Work

ALIVE_S = 1.0
"""Between two signs of life, either way. Our choice."""
LOST_S = 30.0
"""Time without one after which a shard ends. Our choice."""
_PARENT_DIED = 1
"""PR_SET_PDEATHSIG."""


class LinkedEngines:
    """The first rank's engines, asked over the link; `asking.Generates`."""

    def __init__(self, send: Callable[[Record], Awaitable[None]]) -> None:
        self._send = send
        self._asked: dict[int, asyncio.Future[Generated]] = {}
        self._number = 0
        self.num_serving = 1
        """The first rank knows how many there are; it says so where there are none."""

    async def generate(self, request: Request) -> Generated:
        """See `Generates`."""
        number, self._number = self._number, self._number + 1
        future: asyncio.Future[Generated] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        try:
            await self._send(request_message(number, request))
            return await future
        finally:
            del self._asked[number]

    def answered(self, message: Record) -> None:
        """The first rank has answered, or an engine has not."""
        future = self._asked.get(message.header["number"])
        if future is None or future.done():
            return
        if message.header["kind"] == "generated":
            future.set_result(generated_of(message))
        else:
            self.num_serving = message.header["serving"]
            future.set_exception(EngineError(message.header["why"]))


class Shard:
    """See the head of this file."""

    def __init__(self, link: ShardLink) -> None:
        self._link = link
        self.engines = LinkedEngines(link.send)
        """Engines of the first rank."""
        self._rollouts: Rollouts | None = None
        self._running: dict[int, asyncio.Task[None]] = {}
        self._telling: set[asyncio.Future[None]] = set()
        self._heard = time.monotonic()
        self._figures: Callable[[], Mapping[str, Any]] = dict
        self._announced: Callable[[int], None] = _nothing

    async def run(self, incarnation: int) -> None:
        """Work until drained, or lost."""
        await self._link.send(Record({"kind": "hello", "incarnation": incarnation, "pid": os.getpid()}))
        signs = asyncio.create_task(self._live())
        try:
            while True:
                receiving = asyncio.ensure_future(self._link.receive())
                done, _ = await asyncio.wait([receiving, signs], return_when=asyncio.FIRST_COMPLETED)
                if receiving not in done:
                    receiving.cancel()
                    return
                message = receiving.result()
                self._heard = time.monotonic()
                if message.header["kind"] == "drain":
                    return
                await self._take(message)
        finally:
            signs.cancel()
            for task in self._running.values():
                task.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)
            if self._rollouts is not None:
                with contextlib.suppress(TimeoutError):
                    await self._rollouts.close()
            self._link.close()

    async def _take(self, message: Record) -> None:
        header = message.header
        match header["kind"]:
            case "begin":
                module, _, function = header["build"].partition(":")
                # However long that takes: the first rank's signs are not looked at meanwhile.
                self._heard = math.inf
                try:
                    found = await asyncio.to_thread(lambda: importlib.import_module(module))
                    self._rollouts = await getattr(found, function)(self, header["arguments"])
                except Exception as error:
                    why = str(error) if isinstance(error, K25Error) else f"{type(error).__name__}: {error}"
                    await self._link.send(Record({"kind": "unbuilt", "why": why}))
                    raise
                self._heard = time.monotonic()
                await self._link.send(Record({"kind": "built"}))
            case "work":
                number, work = header["number"], work_of(message)
                if number in self._running:
                    # It was thought to be lost.
                    return
                task = asyncio.create_task(self._work(number, work))
                self._running[number] = task
                task.add_done_callback(lambda _: self._running.pop(number, None))
            case "cancel":
                if (running := self._running.get(header["number"])) is not None:
                    running.cancel()
            case "version":
                self._announced(header["version"])
            case "generated" | "refused":
                self.engines.answered(message)

    async def _work(self, number: int, work: Work) -> None:
        assert self._rollouts is not None, "begin comes first"
        outbox: asyncio.Queue[Record | None] = asyncio.Queue()
        sending = asyncio.create_task(self._send_on(outbox))

        def append(record: Record) -> None:
            apply_record(record, work.response, work.media)
            outbox.put_nowait(record_message(number, record))

        try:
            await self._rollouts.respond(work, append)
            last = Record({"kind": "done", "number": number})
        except Exception as error:
            kind = "engine" if isinstance(error, EngineError) else "rollout"
            why = str(error) if isinstance(error, K25Error) else f"{type(error).__name__}: {error}"
            last = Record({"kind": "failed", "number": number, "of": kind, "why": why})
        except asyncio.CancelledError:
            sending.cancel()
            raise
        outbox.put_nowait(last)
        outbox.put_nowait(None)
        await sending

    async def _send_on(self, outbox: asyncio.Queue[Record | None]) -> None:
        while (message := await outbox.get()) is not None:
            await self._link.send(message)

    async def _live(self) -> None:
        """Give signs of life until none is heard."""
        while time.monotonic() - self._heard < LOST_S:
            numbers = np.array(list(self._running), np.int32)
            await self._link.send(Record({"kind": "alive", **self.figures()}, {"numbers": numbers}))
            await asyncio.sleep(ALIVE_S)

    def figures(self) -> dict[str, Any]:
        """What the sign of life says."""
        return {"figures": dict(self._figures())}

    def notice(self, text: str) -> None:
        """Have the first rank tell what there is to know."""
        telling = asyncio.ensure_future(self._link.send(Record({"kind": "notice", "text": text})))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)

    def follows(self, announced: Callable[[int], None]) -> None:
        """Call this with the version of the engines' weights whenever they have others."""
        self._announced = announced

    def tells(self, figures: Callable[[], Mapping[str, Any]]) -> None:
        """Have signs of life say this as well, as JSON has it."""
        self._figures = figures


def _nothing(_: int) -> None:
    """Nobody follows versions."""


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process once its parent is gone, however that went."""
    ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def main() -> None:
    """`python -m …shards.shard ADDRESS NAME INCARNATION PARENT`, as `processes.py` starts it."""
    address, name, incarnation, parent = sys.argv[1:]
    end_with_parent(int(parent))
    import uvloop

    uvloop.run(_main(address, name, int(incarnation)))


async def _main(address: str, name: str, incarnation: int) -> None:
    await Shard(ShardLink(address, name)).run(incarnation)


if __name__ == "__main__":
    main()
