"""Calls that may never return: a read from a server that is gone hangs in the kernel, whatever Python does.

Each runs in a thread that is given up when its time is over; the thread ends when, and if, the call returns.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any


class HungReadError(TimeoutError):
    """A read did not return within its time."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"it did not return within data.read_timeout_s={timeout_s:g} s")


class Deadline:
    """Runs calls with a limit on their time. Safe across threads and forks."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._idle: list[_Caller] = []
        self._pid = os.getpid()

    def run[Result](self, call: Callable[[], Result]) -> Result:
        """What `call` returns. Raises what it does, and `HungReadError` when its time is over."""
        caller = self._take()
        caller.calls.put(call)
        try:
            result, error = caller.answers.get(timeout=self.timeout_s)
        except Empty:
            caller.calls.put(None)  # it ends after the call, if that returns
            raise HungReadError(self.timeout_s) from None
        self._idle.append(caller)
        if error is not None:
            raise error
        answer: Result = result
        return answer

    def __del__(self) -> None:
        # A thread of another process is none of this one's.
        for caller in self._idle if self._pid == os.getpid() else ():
            caller.calls.put(None)

    def _take(self) -> "_Caller":
        if self._pid != os.getpid():
            # Threads are not forked along.
            self._idle, self._pid = [], os.getpid()
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        return _Caller()


class _Caller:
    """A thread that waits for calls."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self.answers: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()
        threading.Thread(target=self._serve, name="k25-read", daemon=True).start()

    def _serve(self) -> None:
        while (call := self.calls.get()) is not None:
            try:
                self.answers.put((call(), None))
            except Exception as error:  # raised where the call was asked for
                self.answers.put((None, error))
            # Whatever the call holds, as an open file, is not kept until the next one.
            del call
