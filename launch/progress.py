"""How far a run has come, by its metrics, which may be long, and cut short or damaged anywhere."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAIL_BYTES = 1 << 20
"""Bytes of the metrics that are read at a time, from the end: more than two rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the metrics say that a run has come."""

    last: int | None = None
    """Step of the last row; None if there is none."""
    sound: int | None = None
    """Last step whose loss and gradient were finite, or the evaluation at step 0; None if there is none."""
    skipped: int = 0
    """Rows after it: steps that changed no weight, since their gradient was not finite."""


def progress_of(metrics: Path) -> Progress:
    """How far a file of metrics has come. Skipped steps are no progress, however many there are."""
    last, skipped = None, 0
    for row in rows_from_the_end(metrics):
        last = row["step"] if last is None else last
        if is_sound(row):
            return Progress(last=last, sound=row["step"], skipped=skipped)
        skipped += 1
    return Progress(last=last, skipped=skipped)


def stamp_of(metrics: Path) -> tuple[int, int] | None:
    """Modification time and size of the file; None if it does not exist."""
    try:
        status = metrics.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size


def rows_from_the_end(metrics: Path) -> Iterator[dict[str, Any]]:
    """Complete rows of the file, last one first; what is no row is passed over."""
    try:
        file = metrics.open("rb")
    except FileNotFoundError:
        return
    with file:
        # The end of the file that is no complete line, then the beginning of a line read in part.
        end, rest, is_last = file.seek(0, os.SEEK_END), b"", True
        while end > 0:
            start = max(0, end - TAIL_BYTES)
            file.seek(start)
            first, *lines = (file.read(end - start) + rest).split(b"\n")
            if is_last and lines:
                lines.pop()
                is_last = False
            rest, end = first, start
            yield from filter(None, map(parse_row, reversed(lines)))
        if not is_last:
            yield from filter(None, [parse_row(rest)])


def parse_row(line: bytes) -> dict[str, Any] | None:
    """A row of the metrics; None if the line is not one."""
    try:
        row = json.loads(line)
        step = row["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return row if isinstance(step, int) and not isinstance(step, bool) else None


def is_sound(row: dict[str, Any]) -> bool:
    """Whether a step has changed the weights as it should; null is what the metrics have for NaN and
    infinity."""
    return row.get("loss", 0.0) is not None and row.get("grad_norm", 0.0) is not None
