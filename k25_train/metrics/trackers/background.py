"""A sink behind a thread of its own: a service that is slow, or cannot be reached, holds no step up."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from k25_train.metrics.sinks import MOST_ROWS, Row, SteadySink

CLOSE_S = 60.0
"""Longest time that the end of a run waits for a service. Source: our choice."""


class BackgroundSink:
    """Hands rows on to a `SteadySink` in another thread, in order."""

    def __init__(self, sink: SteadySink, warn: Callable[[str], None], *, close_s: float = CLOSE_S) -> None:
        self.name = sink.name
        self._sink = sink
        self._warn = warn
        self._close_s = close_s
        self._rows: queue.Queue[Row | None] = queue.Queue(MOST_ROWS)
        self._num_lost = 0
        self._thread = threading.Thread(target=self._run, name=f"metrics to {self.name}", daemon=True)
        self._thread.start()

    def write(self, row: Row) -> None:
        """Take a row; lost if too many wait."""
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._num_lost += 1

    def close(self) -> None:
        """Hand on what waits, for some time; then the run ends without it."""
        try:
            self._rows.put(None, timeout=self._close_s)
            self._thread.join(self._close_s)
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._num_lost += self._rows.qsize()
            self._warn(f"{self.name}: does not answer within {self._close_s:.0f} s, the run ends without it")
        if self._num_lost:
            self._warn(f"{self.name}: {self._num_lost} row(s) could not be handed on and are lost")

    def _run(self) -> None:
        while (row := self._rows.get()) is not None:
            self._sink.write(row)
        self._sink.close()
