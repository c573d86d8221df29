"""An engine behind HTTP, whichever wire it speaks: the protocol's promises, kept on the client's side.

- Everything has a time limit, which is stopped while the engine is paused.
- Of generating there are at most `max_running` requests on the way; all others wait here, so that a pause or
  an update never queues behind them.
- A paused engine gets no new requests, one lost in a pause refuses them; a pause that aborts returns when
  everything has ended.
- Every answer is checked (`checks.py`); an engine whose new weights were not all taken serves no more.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from k25_train.export.stream import NamedTensor
from k25_train.rollout.engines.base import (
    EngineState,
    FinishReason,
    Generated,
    PauseMode,
    ProbeSequence,
    Request,
)
from k25_train.rollout.engines.busy_clock import BusyClock
from k25_train.rollout.engines.checks import AnswerCheck
from k25_train.rollout.engines.faults import FaultKind, FaultLog
from k25_train.rollout.engines.http_client import HttpClient
from k25_train.rollout.engines.served_model import ServedModel
from k25_train.rollout.engines.staging import write_folder
from k25_train.rollout.engines.time_limits import PausableLimits
from k25_train.rollout.engines.wire import HttpLimits, Wire

ABORT_AGAIN_S = 0.5
"""Seconds after which requests that reached an engine after its pause are aborted too."""


class _Staged(NamedTuple):
    version: int
    folder: Path
    is_ours: bool


class HttpEngine:
    """Implements `Engine` over a wire."""

    def __init__(self, wire: Wire, http: HttpClient, model: ServedModel, limits: HttpLimits) -> None:
        """Call `connect` before anything else."""
        self._wire, self._http, self._limits = wire, http, limits
        self._faults: FaultLog = http.faults
        self._check = AnswerCheck(self._faults, model)
        self._clocks, self._busy = PausableLimits(), BusyClock()
        self._slots = asyncio.Semaphore(limits.max_running)
        self._decided, self._is_paused = asyncio.Event(), False
        self._decided.set()
        self._num_sent = self._num_aborts = self._version = 0
        self._is_followed = False
        self._staged: _Staged | None = None
        self._why_lost = ""

    @property
    def name(self) -> str:
        """Kind and URL."""
        return self._faults.name

    @property
    def faults(self) -> dict[str, int]:
        """How often it failed, by kind (`FaultKind`)."""
        return dict(self._faults.counts)

    async def connect(self) -> None:
        """Meet the server. Raises `EngineError` if it lacks something."""
        self._version = await self._wire.prepare()

    async def generate(self, request: Request) -> Generated:
        """As `Engine.generate`. A response that has ended already comes back as it is."""
        nothing = self._check.nothing(request)
        if nothing.finish_reason is not FinishReason.aborted:
            return nothing
        await self._decided.wait()
        aborts = self._num_aborts
        async with self._slots:
            while not self._decided.is_set() and aborts == self._num_aborts:
                await self._decided.wait()
            if aborts != self._num_aborts:
                return nothing
            return await self._send(request)

    async def _send(self, request: Request) -> Generated:
        self._refuse_lost(request.key)
        first = self._version
        self._num_sent += 1
        self._busy.start()
        try:
            async with self._clocks.within(self._limits.request_s):
                answer = await self._wire.generate(request)
        except TimeoutError as error:
            self._refuse_lost(request.key)
            raise self._http.too_late(request.key, self._limits.request_s) from error
        finally:
            self._num_sent -= 1
            self._busy.stop()
        # Who gives the weights may be a little ahead of who says so.
        spans = [span.version for span in answer.spans] if self._is_followed else []
        return self._check.generated(request, answer, (first, max([self._version, *spans])))

    def follow(self, version: int) -> None:
        """Another process has given the server the weights of a version, and may give it later ones."""
        self._is_followed = True
        self._version, self._why_lost = version, ""

    async def pause(self, mode: PauseMode) -> None:
        """As `Engine.pause`."""
        self._is_paused = True
        self._decided.clear()
        self._clocks.pause()
        self._busy.pause()
        if mode is PauseMode.abort:
            self._num_aborts += 1
        with self._lost_unless_done("a pause"):
            await self._wire.pause(mode)
            if mode is PauseMode.abort:
                await self._await_the_end()

    async def _await_the_end(self) -> None:
        try:
            async with asyncio.timeout(self._limits.update_s):
                waited_s, tick_s = 0.0, ABORT_AGAIN_S / 50
                while self._num_sent:
                    await asyncio.sleep(tick_s)
                    waited_s += tick_s
                    if waited_s >= ABORT_AGAIN_S:
                        await self._wire.pause(PauseMode.abort)
                        waited_s = 0.0
        except TimeoutError as error:
            late = f"abort of {self._num_sent} responses"
            raise self._http.too_late(late, self._limits.update_s) from error

    async def resume(self) -> None:
        """As `Engine.resume`."""
        with self._lost_unless_done("going on"):
            await self._wire.resume()
        self._clocks.resume()
        self._busy.resume()
        self._is_paused = False
        self._decided.set()

    async def stage(self, tensors: "Iterable[NamedTensor] | Path", version: int) -> None:
        """As `Engine.stage`; a folder has to be where the server finds it under the same path, and stay
        until the commit."""
        self._drop_staged()
        is_ours = not isinstance(tensors, Path)
        folder = tensors if isinstance(tensors, Path) else await write_folder(tensors)
        if not any(folder.glob("*.safetensors")):
            raise self._faults.error(
                FaultKind.weights,
                f"stage of version {version}",
                f"{folder} has no *.safetensors",
                "name the folder that holds the weights of this version",
            )
        self._staged = _Staged(version, folder, is_ours)

    async def commit(self, version: int) -> None:
        """As `Engine.commit`. If it fails, nobody knows by which weights the engine would generate: what it
        generates fails, and what comes is refused, until a later commit succeeds."""
        subject = f"commit of version {version}"
        if self._staged is None or self._staged.version != version:
            staged = f"version {self._staged.version}" if self._staged else "nothing"
            raise self._faults.error(
                FaultKind.weights, subject, f"{staged} is staged", "stage this version before it is committed"
            )
        self._refuse_unpaused(subject)
        with self._lost_unless_done(subject):
            async with self._within(subject):
                await self._wire.load(self._staged.folder.resolve(), version)
        self._version, self._why_lost = version, ""
        self._decided.clear()
        self._drop_staged()

    async def adopt(self, version: int) -> None:
        """As `Engine.adopt`. If it fails, it is as with `commit`."""
        subject = f"version {version}, which came by another way,"
        self._refuse_unpaused(subject)
        with self._lost_unless_done(subject):
            async with self._within(subject):
                await self._wire.adopt(version)
        self._version, self._why_lost = version, ""
        self._decided.clear()

    async def probe(self, sequences: Sequence[ProbeSequence]) -> list[np.ndarray]:
        """As `Engine.probe`. A paused server would not answer: it goes on for the time of the probe, and
        responses that were kept get a few tokens more, of the weights that are probed."""
        is_paused = self._is_paused
        async with self._within("probe"):
            if is_paused:
                await self._wire.resume()
            try:
                return list(await asyncio.gather(*(self._probe(*each) for each in enumerate(sequences))))
            finally:
                if is_paused:
                    await self._wire.pause(PauseMode.keep)

    async def _probe(self, number: int, sequence: ProbeSequence) -> np.ndarray:
        subject = f"probe {number}"
        expected = self._check.asked(subject, sequence.token_ids, sequence.images)
        ids, values = await self._wire.probe(sequence, subject)
        self._check.expanded(subject, expected, ids)
        return self._check.logprobs(subject, values, len(expected) - 1)

    async def state(self) -> EngineState:
        """As `Engine.state`; `busy_share` is the share in which it generated for this client."""
        counted = await self._wire.counts()
        return EngineState(**counted._asdict(), busy_share=self._busy.share())

    async def close(self) -> None:
        """Close the connections; the server goes on."""
        self._drop_staged()
        await self._http.close()

    @asynccontextmanager
    async def _within(self, subject: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._limits.update_s):
                yield
        except TimeoutError as error:
            raise self._http.too_late(subject, self._limits.update_s) from error

    @contextmanager
    def _lost_unless_done(self, subject: str) -> Iterator[None]:
        """Fails what is on the way, and what waits for the end of a pause, if the block does: kept responses
        of an engine that nobody resumes would never end."""
        try:
            yield
        except BaseException:
            self._why_lost = f"{subject} did not end well"
            self._clocks.expire()
            self._decided.set()
            raise

    def _refuse_unpaused(self, subject: str) -> None:
        if not self._is_paused:
            remedy = "pause it before it gets new weights"
            raise self._faults.error(FaultKind.weights, subject, "it is not paused", remedy)

    def _refuse_lost(self, subject: str) -> None:
        if self._why_lost:
            remedy = "push weights again, which takes it back, or start it again"
            raise self._faults.error(FaultKind.weights, subject, self._why_lost, remedy)

    def _drop_staged(self) -> None:
        if self._staged is not None and self._staged.is_ours:
            shutil.rmtree(self._staged.folder, ignore_errors=True)
        self._staged = None
