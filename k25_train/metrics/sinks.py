"""Where a run's metrics go: `metrics.jsonl`, one object per step, and TensorBoard; `trackers` has others.
Only rank 0 makes sinks.

A row is a flat mapping of numbers, and of lists of numbers, with `step`: the number of finished optimizer
steps, 0 for the evaluation before the first. Its names are in the README of this folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from k25_train.run_folder.rows_file import Row, as_line, drop_rows_from, is_finite, number, read_rows

__all__ = ["JsonlSink", "Row", "Sink", "SteadySink", "TensorBoardSink", "is_finite", "number", "read_rows"]

EVAL_PREFIX = "eval_"
MOST_ROWS = 10_000
"""Rows that wait for a sink to work again; the oldest beyond them are lost."""
RETRY_S = 10.0
"""Seconds until a sink that failed is tried again. Source: our choice."""


class Sink(Protocol):
    """Takes one row per step, in order."""

    rows_per_flush: int
    """Rows after which a caller should `flush`."""

    def write(self, row: Row) -> None:
        """Take one step's metrics."""

    def flush(self) -> None:
        """Return once all rows are where they belong; raises what kept them from it."""

    def close(self) -> None:
        """Finish; nothing may be written after."""


class JsonlSink:
    """Appends one JSON object per step, written at once, so that a killed run keeps all it reached.

    Floats are written so that reading gives the same bits; infinities and NaN, which JSON lacks, as null.
    """

    rows_per_flush = 1

    def __init__(self, path: Path, first_step: int, warn: Callable[[str], None] = print) -> None:
        """Open for writing from `first_step` on; a resumed run drops what an earlier one wrote from there.

        Raises OSError where the file cannot be written; `warn` is told of damaged lines.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_rows_from(path, first_step, warn)
        self._file = path.open("ab", buffering=0)

    def write(self, row: Row) -> None:
        """Append a row. Raises OSError where the disk does not take it, or the file is no longer there."""
        if not os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
            raise OSError(errno.ENOENT, "was replaced while it was open", str(self.path))
        line, before = as_line(row), self.path.stat().st_size
        num_written = 0
        try:
            num_written = self._file.write(line)
        finally:
            # No half line stays.
            if num_written != len(line):
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file.fileno(), before)
        if num_written != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """Writes scalars for TensorBoard: `train/loss`, `eval/text_loss`, of lists `max_logits/00`, and so on."""

    rows_per_flush = 20

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open an event file whose readers forget steps from `first_step` on that an earlier run wrote."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and needs torch

        _quiet_writer_threads()
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, row: Row) -> None:
        """Add a row's scalars."""
        for key, value in row.items():
            if isinstance(value, Sequence):
                for index, element in enumerate(value):
                    self._writer.add_scalar(f"{key}/{index:02d}", number(element), row["step"])
            elif key != "step" and value is not None:
                is_eval = key.startswith(EVAL_PREFIX)
                tag = f"eval/{key.removeprefix(EVAL_PREFIX)}" if is_eval else f"train/{key}"
                self._writer.add_scalar(tag, value, row["step"])

    def flush(self) -> None:
        """Have the writer's thread write what is pending; raises what it failed with."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is pending and close."""
        self._writer.close()


class SteadySink:
    """A sink whose faults do not end a run: rows wait until it works again, and each fault is told once."""

    def __init__(
        self,
        name: str,
        open_sink: Callable[[int], Sink],
        warn: Callable[[str], None],
        *,
        most_rows: int = MOST_ROWS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`open_sink(first_step)` makes the sink, at the first row and after each fault."""
        self.name = name
        self.num_lost = 0
        """Rows that were dropped because too many waited."""
        self._open_sink = open_sink
        self._warn = warn
        self._clock = clock
        self._most_rows = most_rows
        self._waiting: deque[Row] = deque()
        """Rows that the sink has not confirmed, the oldest first."""
        self._num_written = 0
        """How many of them it has taken since it was opened."""
        self._sink: Sink | None = None
        self._failed_at_s: float | None = None

    def start(self, first_step: int) -> None:
        """Open the sink now. Raises what the sink raises: before the run, a fault costs nothing yet."""
        self._sink = self._open_sink(first_step)

    def write(self, row: Row) -> None:
        """Hand a row on, or keep it."""
        self._waiting.append(row)
        if len(self._waiting) > self._most_rows:
            self._waiting.popleft()
            self._num_written = max(0, self._num_written - 1)
            self.num_lost += 1
        if self._failed_at_s is None or self._clock() >= self._failed_at_s + RETRY_S:
            self._hand_on(self._sink.rows_per_flush if self._sink is not None else 1)

    def close(self) -> None:
        """Hand on what waits, and say what is lost."""
        self._hand_on(1)
        if self._sink is not None:
            try:
                self._sink.close()
            except Exception as error:
                self._warn(f"{self.name}: could not be closed ({_text(error)})")
        num_lost = self.num_lost + len(self._waiting)
        if num_lost:
            self._warn(f"{self.name}: {num_lost} row(s) could not be written and are lost")

    def _hand_on(self, rows_per_flush: int) -> None:
        """Write what waits; where the sink fails, with whatever error, keep it for later."""
        if not self._waiting:
            return
        try:
            if self._sink is None:
                self._sink = self._open_sink(int(number(self._waiting[0]["step"])))
            for row in list(self._waiting)[self._num_written :]:
                self._sink.write(row)
                self._num_written += 1
            if self._num_written >= rows_per_flush or self._failed_at_s is not None:
                self._sink.flush()
                self._confirm()
        except Exception as error:
            self._fail(error)

    def _confirm(self) -> None:
        if self._failed_at_s is not None:
            self._warn(f"{self.name}: works again, {len(self._waiting)} row(s) that waited are written")
        self._failed_at_s = None
        self._waiting.clear()
        self._num_written = 0

    def _fail(self, error: Exception) -> None:
        """Close what is left of the sink and wait; rows that it took may be lost and are written again."""
        if self._failed_at_s is None:
            self._warn(
                f"{self.name}: cannot be written ({_text(error)}); the run goes on, and up to "
                f"{self._most_rows:,} rows wait in memory until it works again"
            )
        broken, self._sink = self._sink, None
        if broken is not None:
            with contextlib.suppress(Exception):
                broken.close()
        self._num_written = 0
        self._failed_at_s = self._clock()


def _text(error: Exception) -> str:
    code = errno.errorcode.get(error.errno or 0) if isinstance(error, OSError) else None
    return f"{code or type(error).__name__}: {error}"


def _quiet_writer_threads() -> None:
    """Keep TensorBoard's threads from printing a traceback: what they fail with comes back in `flush`."""
    before = threading.excepthook
    if getattr(before, "is_quiet", False):
        return

    def hook(caught: threading.ExceptHookArgs) -> None:
        if type(caught.thread).__name__ != "_AsyncWriterThread":
            before(caught)

    hook.is_quiet = True  # type: ignore[attr-defined]
    threading.excepthook = hook
