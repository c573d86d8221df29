"""Rows of metrics, and the lines of `metrics.jsonl` that hold them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

Value = float | int | None
Row = Mapping[str, Value | Sequence[Value]]
"""One step's metrics; read back from a file, None in place of a number that was not finite."""
METRICS_FILE = "metrics.jsonl"
DAMAGED = "metrics.damaged"
"""File next to `metrics.jsonl` that keeps lines which are no rows, as they were."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of `metrics.jsonl`."""

    content: bytes
    """As it is in the file, without its end."""
    row: Row | None
    """What it says; None if it is damaged."""


def number(value: Value | Sequence[Value]) -> float:
    """The value, NaN for None. Raises TypeError for a list."""
    if isinstance(value, Sequence):
        raise TypeError(f"{value!r} is a list of metrics, not one")
    return math.nan if value is None else value


def is_finite(value: Value) -> bool:
    """Whether a value is a number that JSON has."""
    return value is not None and math.isfinite(value)


def as_line(row: Row) -> bytes:
    """The row as a line of the file, with its end; null for what JSON does not have."""

    def finite(value: Value) -> Value:
        return value if is_finite(value) else None

    values = {
        key: [finite(element) for element in value] if isinstance(value, Sequence) else finite(value)
        for key, value in row.items()
    }
    return (json.dumps(values, allow_nan=False) + "\n").encode()


def read_rows(path: Path) -> list[Row]:
    """All rows of a `metrics.jsonl`; damaged lines are left out."""
    return [line.row for line in read_lines(path) if line.row is not None]


def latest_rows(path: Path, num_bytes: int) -> list[Row]:
    """The rows in the last bytes of a `metrics.jsonl`, in order; none if there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - num_bytes))
            lines = file.read(num_bytes).split(b"\n")
    except FileNotFoundError:
        return []
    # The first may have lost its beginning, and is then no row.
    return [row for line in lines if (row := parse(line)) is not None]


def read_lines(path: Path) -> list[Line]:
    """The lines of a `metrics.jsonl`; what a kill cut short at its end is the last of them."""
    *lines, end = path.read_bytes().split(b"\n")
    return [Line(line, parse(line)) for line in [*lines, *([end] if end else [])]]


def parse(line: bytes) -> Row | None:
    """The row that a line holds, None if it holds none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if is_row(row) else None


def is_row(row: Any) -> TypeGuard[Row]:
    """Whether this is a mapping of metrics with the step that they are of."""
    if not isinstance(row, dict) or not is_number(row.get("step")) or row["step"] < 0:
        return False
    values = [each for value in row.values() for each in (value if isinstance(value, list) else [value])]
    return all(value is None or is_number(value) for value in values)


def is_number(value: object) -> TypeGuard[float]:
    """Whether this is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def drop_rows_from(path: Path, first_step: int, warn: Callable[[str], None]) -> None:
    """Remove the rows of `first_step` and later, and damaged lines; others stay as they are, to the byte.

    A damaged line at the end is what a kill cut short and is dropped. Others are moved to `metrics.damaged`.
    """
    scratch = path.with_suffix(".tmp")
    # Of a process that was killed while it did this.
    scratch.unlink(missing_ok=True)
    if not path.exists():
        return
    before = path.read_bytes()
    lines = read_lines(path)
    if lines and lines[-1].row is None:
        lines.pop()
    damaged = [line.content for line in lines if line.row is None and line.content]
    kept = [line.content for line in lines if line.row is not None and number(line.row["step"]) < first_step]
    after = b"".join(line + b"\n" for line in kept)
    if damaged:
        aside = path.with_name(DAMAGED)
        with aside.open("ab") as file:
            file.write(b"".join(line + b"\n" for line in damaged))
        warn(f"{path}: {len(damaged)} damaged line(s) moved to {aside}")
    if after == before:
        return
    if before.startswith(after):
        # The usual case: needs no room, which there may be none of.
        os.truncate(path, len(after))
        return
    scratch.write_bytes(after)
    os.replace(scratch, path)
