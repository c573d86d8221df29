"""The engine's thread: it makes tokens, and between two of them does what it is told.

An event loop calls in from any thread and waits for a future. Whatever goes wrong in here ends every future
with an `EngineError` that says what it was; none is left waiting.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from k25_train.errors import K25Error
from k25_train.rollout.engines.base import EngineError, Generated
from k25_train.rollout.engines.in_process.responses import Response
from k25_train.rollout.engines.in_process.slots import Slots


class Worker:
    """Runs `Slots` in a thread of its own."""

    def __init__(self, slots: Slots, name: str, threads: int) -> None:
        """`threads`: of torch's operators, which is of the whole process; 0 leaves them alone."""
        self._slots = slots
        self._name = name
        self._threads = threads
        self._changed = threading.Condition()
        self._arrived: deque[Response] = deque()
        self._tasks: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._failure: EngineError | None = None
        self._closing = False
        self._busy_s = 0.0
        self._asked_at = time.perf_counter()
        self.paused = False
        """Whether no token is made; changed by tasks alone."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, response: Response) -> "Future[Generated]":
        """Generate a response. Raises `EngineError` if the thread has ended."""
        with self._changed:
            self._check()
            self._arrived.append(response)
            self._changed.notify()
        return response.future

    def call[T](self, function: Callable[[], T]) -> "Future[T]":
        """Have the thread call a function between two tokens. Raises `EngineError` if it has ended."""
        future: Future[T] = Future()
        with self._changed:
            self._check()
            self._tasks.append((function, future))
            self._changed.notify()
        return future

    def busy_share(self) -> float:
        """Share of the time since it was last asked in which it generated. A task of the thread."""
        now = time.perf_counter()
        share = self._busy_s / max(now - self._asked_at, 1e-9)
        self._busy_s, self._asked_at = 0.0, now
        return min(share, 1.0)

    def close(self) -> None:
        """End the thread behind the token that it makes; who waits gets an `EngineError`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    @property
    def _has_work(self) -> bool:
        return not self.paused and (self._slots.has_work or bool(self._arrived))

    def _run(self) -> None:
        failure = EngineError(f"{self._name}: the engine was closed")
        try:
            if self._threads:
                torch.set_num_threads(self._threads)
            with torch.inference_mode():
                while self._turn():
                    pass
        except BaseException as error:
            failure = EngineError(f"{self._name}: generating failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
        with self._changed:
            self._failure = failure
            tasks, self._tasks = self._tasks, deque()
        self._slots.waiting.extend(self._arrived)
        self._slots.fail(failure)
        for _, future in tasks:
            if not future.done():
                future.set_exception(failure)

    def _turn(self) -> bool:
        """Tasks, then one token each; false once it is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._tasks or self._has_work)
            if self._closing:
                return False
            tasks, self._tasks = self._tasks, deque()
            self._slots.waiting.extend(self._arrived)
            self._arrived.clear()
        for function, future in tasks:
            _answer(function, future)
        if self._has_work:
            start = time.perf_counter()
            self._slots.step()
            self._busy_s += time.perf_counter() - start
        return True


def _answer(function: Callable[[], Any], future: "Future[Any]") -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except K25Error as error:
        future.set_exception(error)
    except Exception as error:
        future.set_exception(EngineError(f"{type(error).__name__}: {error}"))
