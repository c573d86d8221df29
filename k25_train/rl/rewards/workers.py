"""Applies rules in processes of their own, each of which is killed at its deadline and replaced.

A rule that runs away costs one verdict and one process: an asyncio task cannot be stopped in the middle of
computing, nor can a thread. Requests and verdicts are JSON, so that nothing is unpickled.
"""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import k25_train
from k25_train.environments.base import Verdict, unscored
from k25_train.errors import MachineError
from k25_train.rl.rewards.text_rules import PREPARED
from k25_train.rl.rewards.worker import READY

DEADLINE_S = 2.0
"""Seconds for one verdict of a rule. Source: our choice, some hundred times the usual ones."""
START_S = 60.0
"""Seconds in which a worker has to be ready."""
_ROOT = Path(k25_train.__file__).parents[1]
_LINE_BYTES = 1 << 20


class RuleWorkers:
    """A pool of workers, started when they are first needed. Belongs to one event loop."""

    def __init__(self, num_workers: int, deadline_s: float = DEADLINE_S) -> None:
        """At most `num_workers` processes at once; further requests wait."""
        self._room = asyncio.Semaphore(num_workers)
        self._idle: list[asyncio.subprocess.Process] = []
        self._deadline_s = deadline_s
        self._prepared: WeakKeyDictionary[asyncio.subprocess.Process, set[str]] = WeakKeyDictionary()
        """Rules for which a process has what they need."""

    async def apply(self, rule: str, content: str, reference: Any) -> Verdict:
        """The verdict of a rule of `text_rules.RULES`; `unscored` past the deadline."""
        request = {"rule": rule, "content": content, "reference": reference, "deadline_s": self._deadline_s}
        line = json.dumps(request).encode() + b"\n"
        async with self._room, self._worker() as process:
            assert process.stdin is not None
            assert process.stdout is not None
            await self._prepare(process, rule)
            with contextlib.suppress(ConnectionError):
                process.stdin.write(line)
                await process.stdin.drain()
            try:
                # Its own alarm rings first.
                answer = await asyncio.wait_for(process.stdout.readline(), self._deadline_s + 1)
            except TimeoutError:
                answer = b""
            if answer.endswith(b"\n"):
                self._idle.append(process)
                return Verdict.from_json(json.loads(answer))
        return unscored(f"judge out of time or dead: rule {rule} gave no verdict in {self._deadline_s:g} s")

    async def _prepare(self, process: asyncio.subprocess.Process, rule: str) -> None:
        """Have a process do what a rule needs once. Raises MachineError where it cannot."""
        prepared = self._prepared.setdefault(process, set())
        if rule not in PREPARED or rule in prepared:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(json.dumps({"prepare": rule}).encode() + b"\n")
            await process.stdin.drain()
        answer = await asyncio.wait_for(process.stdout.readline(), START_S)
        if answer.strip() != READY.encode():
            raise MachineError(f"a worker could not prepare the rule {rule}; its own message is above")
        prepared.add(rule)

    @contextlib.asynccontextmanager
    async def _worker(self) -> AsyncIterator[asyncio.subprocess.Process]:
        """A worker, which is killed at the end unless it has gone back to the idle ones."""
        process = self._idle.pop() if self._idle else await _started()
        try:
            yield process
        finally:
            if process not in self._idle:
                await _end(process)

    async def close(self) -> None:
        """End all workers."""
        idle, self._idle = self._idle, []
        for process in idle:
            await _end(process)


async def _started() -> asyncio.subprocess.Process:
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "k25_train.rl.rewards.worker",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        limit=_LINE_BYTES,
    )
    assert process.stdout is not None
    try:
        first = await asyncio.wait_for(process.stdout.readline(), START_S)
    except BaseException:
        await _end(process)
        raise
    if first.strip() != READY.encode():
        await _end(process)
        raise MachineError(
            f"a worker that applies rules ended as it started, with status {process.returncode}"
        )
    return process


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
