"""Scripted engines as processes of their own, behind our server, that are killed and started again.

A server kills itself in the middle of the call that it is told to die in; who runs it may kill it, too.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k25_train.config.model import ModelConfig
from k25_train.export.stream import NamedTensor
from k25_train.rollout.engines.base import Generated, PauseMode, Request
from k25_train.rollout.engines.served_model import ServedModel
from k25_train.rollout.engines.server import run_server
from tests.helpers.ranks import free_port, start_context
from tests.helpers.scripted_engine import ScriptedEngine

CALLS = ("generate", "pause", "stage", "commit", "resume")
NEVER = ("", 0)
START_S = 60.0
PAUSE_S = 0.0003
"""Seconds that a token takes."""


class FatalEngine(ScriptedEngine):
    """Its process is killed in the middle of a certain call."""

    def __init__(self, fatal: tuple[str, int]) -> None:
        """`fatal`: a call of `CALLS`, and how many of them end well."""
        super().__init__(pause_s=PAUSE_S)
        self._call, self._left = fatal

    def _maybe_die(self, call: str) -> None:
        if call == self._call:
            self._left -= 1
            if self._left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    async def generate(self, request: Request) -> Generated:
        generated = await super().generate(request)
        # It has all tokens, and nobody else has one.
        self._maybe_die("generate")
        return generated

    async def pause(self, mode: PauseMode) -> None:
        await super().pause(mode)
        self._maybe_die("pause")

    async def stage(self, tensors: Iterable[NamedTensor] | Path, version: int) -> None:
        self._maybe_die("stage")
        await super().stage(tensors, version)

    async def commit(self, version: int) -> None:
        await super().commit(version)
        self._maybe_die("commit")

    async def resume(self) -> None:
        self._maybe_die("resume")
        await super().resume()


def serve(port: int, fatal: tuple[str, int], model: ModelConfig, media_pad: int) -> None:
    """What the process of a server does; it ends with the one that started it."""

    async def run() -> None:
        served = ServedModel(vocab_size=model.vocab_size, media_pad=media_pad, vision=model.vision)
        await run_server(FatalEngine(fatal), served, "127.0.0.1", port)
        while os.getppid() == parent:
            await asyncio.sleep(0.5)

    parent = os.getppid()
    asyncio.run(run())


@dataclass(slots=True)
class _Server:
    port: int
    process: Any = None
    fatal: tuple[str, int] = NEVER
    starts_at: float = 0.0


@dataclass(slots=True)
class EngineServers:
    """Servers of one model, which die at drawn moments while `most` of them have not."""

    model: ModelConfig
    media_pad: int
    rng: random.Random
    most: int = 0
    """Deaths that there may be in all."""
    dies_in_calls: bool = True
    """Whether servers die in the middle of calls as well, and not of `kill` alone."""
    deaths: list[str] = field(default_factory=list)
    """What each one was killed in: a call, or `any`, for a moment from outside."""
    servers: list[_Server] = field(default_factory=list)

    def start(self, count: int) -> list[str]:
        """Start so many; their URLs."""
        self.servers = [_Server(free_port()) for _ in range(count)]
        self.ready()
        return [f"http://127.0.0.1:{server.port}" for server in self.servers]

    def restart(self, fatal: Sequence[tuple[str, int]]) -> None:
        """Have servers that die in these calls in place of those that there are."""
        self.stop()
        for server, each in zip(self.servers, fatal, strict=True):
            self._start(server, each)
        self.ready()

    def ready(self) -> None:
        """Have all of them serve."""
        for server in self.servers:
            server.starts_at = 0.0
        self.tend()
        end = time.monotonic() + START_S
        for server in self.servers:
            while not _answers(server.port):
                assert time.monotonic() < end, f"port {server.port}: no server"
                self.tend()
                time.sleep(0.005)

    def tend(self) -> None:
        """Start what has been dead for long enough; call often."""
        now = time.monotonic()
        for server in self.servers:
            if server.process is not None and not server.process.is_alive():
                self._died(server, server.fatal[0])
            if server.process is None and now >= server.starts_at:
                self._start(server, self._drawn())

    def kill(self) -> None:
        """Kill one, at this moment."""
        alive = [each for each in self.servers if each.process is not None and each.process.is_alive()]
        if alive and len(self.deaths) < self.most:
            server = self.rng.choice(alive)
            server.process.kill()
            self._died(server, "any")

    def stop(self) -> None:
        """End all of them."""
        for server in self.servers:
            if server.process is not None:
                server.process.kill()
                server.process.join()
                server.process = None

    def _drawn(self) -> tuple[str, int]:
        """In which call a server dies that is started now."""
        if not self.dies_in_calls or len(self.deaths) >= self.most or self.rng.random() < 0.5:
            return NEVER
        call = self.rng.choice(CALLS)
        return call, self.rng.randrange(20 if call == "generate" else 4)

    def _start(self, server: _Server, fatal: tuple[str, int]) -> None:
        server.fatal = fatal
        arguments = (server.port, server.fatal, self.model, self.media_pad)
        server.process = start_context("cpu").Process(target=serve, args=arguments, daemon=True)
        server.process.start()

    def _died(self, server: _Server, call: str) -> None:
        server.process.join()
        server.process = None
        server.starts_at = time.monotonic() + self.rng.uniform(0.0, 0.5)
        self.deaths.append(call)


def _answers(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0
