"""Measures how long the device is busy, without waiting for it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time of blocks of code on the device; on a GPU by events, without waiting for them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._measured: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, *names: str) -> Iterator[None]:
        """Add the time of a `with` block to these fields of the statistics."""
        if self._device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._measured += [(name, start, end) for name in names]
        else:
            started = time.perf_counter()
            yield
            for name in names:
                self._add(name, time.perf_counter() - started)

    def read_into(self, stats: object) -> None:
        """Add the measured times to the fields of the statistics and reset them; waits for the device."""
        for name, start, end in self._measured:
            # What is complete costs no call that waits.
            if not end.query():
                end.synchronize()
            self._add(name, start.elapsed_time(end) / 1e3)
        for name, seconds in self._seconds.items():
            setattr(stats, name, getattr(stats, name) + seconds)
        self._measured, self._seconds = [], {}

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
