"""Runs to compare, each along the same axis: steps, tokens or hours, behind the run that it started from."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import accumulate

from k25_train.errors import DataError
from k25_train.metrics.sinks import number
from k25_train.metrics.watch.files import file_of
from k25_train.metrics.watch.following import Followed
from k25_train.metrics.watch.seen import settings_of
from k25_train.run_folder.rows_file import METRICS_FILE, Row, is_number


class Axis(Enum):
    """Along what runs are compared."""

    step = "step"
    """Optimizer steps."""
    tokens = "tokens"
    """Tokens that were trained on, padding left out."""
    hours = "hours"
    """Time in steps: without evaluations, saves and pauses."""


_STEP_OF_CHECKPOINT = re.compile(r"step_(\d+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRun:
    """The rows of one run along the axis."""

    name: str
    """Its folder's name; its path where another run's folder is called the same."""
    where: str
    """As given."""
    rows: tuple[Row, ...]
    """In order of steps."""
    xs: tuple[float, ...]
    """[row] -> where it is on the axis."""
    init_from: str | None
    """Where its first weights came from."""
    start: float = 0.0
    """Where it begins: behind the run that it started from, if that is compared too."""

    def points(self, key: str) -> tuple[list[float], list[float]]:
        """Where a figure was measured, and the values; rows without it, or where it is not finite, are left
        out."""
        found = [
            (self.start + x, float(row[key]))  # type: ignore[arg-type]
            for x, row in zip(self.xs, self.rows, strict=True)
            if is_number(row.get(key))
        ]
        return [x for x, _ in found], [y for _, y in found]

    def at(self, step: int) -> float:
        """Where a step, or the last one before it, is on the axis, without its start."""
        steps = [number(row["step"]) for row in self.rows]
        position = bisect_right(steps, step)
        return self.xs[position - 1] if position else 0.0


def load_runs(places: Sequence[str], axis: Axis) -> list[ComparedRun]:
    """The runs in these folders or at these URLs, those that started from others behind them.

    Raises `DataError` for one without a row, `MachineError` and `ConfigError` as `file_of` says.
    """
    names = [place.removesuffix(METRICS_FILE).rstrip("/").rpartition("/")[2] or place for place in places]
    found = [
        load_run(place, name if names.count(name) == 1 else place, axis)
        for place, name in zip(places, names, strict=True)
    ]
    return chained(found)


def load_run(where: str, name: str, axis: Axis) -> ComparedRun:
    """One run."""
    followed = Followed(file_of(where))
    followed.poll()
    rows = sorted(followed.rows, key=lambda row: number(row["step"]))
    if not rows:
        what = "has no row yet" if followed.exists else "is not there"
        raise DataError(f"{followed.file.name}: {what}\n  -> name folders of runs that have begun")
    return ComparedRun(
        name=name,
        where=where,
        rows=tuple(rows),
        xs=positions(rows, axis),
        init_from=settings_of(file_of(where, "config.yaml")).init_from,
    )


def positions(rows: Sequence[Row], axis: Axis) -> tuple[float, ...]:
    """[row] -> where it is."""

    def total(key: str, unit: float) -> tuple[float, ...]:
        values = (row.get(key) for row in rows)
        return tuple(accumulate(float(value) / unit if is_number(value) else 0.0 for value in values))

    ways: dict[Axis, Callable[[], tuple[float, ...]]] = {
        Axis.step: lambda: tuple(number(row["step"]) for row in rows),
        Axis.tokens: lambda: total("tokens", 1.0),
        Axis.hours: lambda: total("step_time_s", 3600.0),
    }
    return ways[axis]()


def chained(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The runs with their starts: one that began with a checkpoint of another goes on where that was."""
    starts: dict[int, float] = {}

    def start_of(index: int, seen: frozenset[int] = frozenset()) -> float:
        if index not in starts:
            run = runs[index]
            before = None if index in seen else _before(run, runs)
            origin = 0.0
            if before is not None and before not in seen:
                match = _STEP_OF_CHECKPOINT.search((run.init_from or "").rstrip("/"))
                earlier = runs[before]
                within = earlier.at(int(match[1])) if match else earlier.xs[-1]
                origin = start_of(before, seen | {index}) + within
            starts[index] = origin
        return starts[index]

    return [replace(run, start=start_of(index)) for index, run in enumerate(runs)]


def _before(run: ComparedRun, runs: Sequence[ComparedRun]) -> int | None:
    """The run in whose folder a run's first weights lie."""
    if run.init_from is None:
        return None
    source = _parts(run.init_from)
    for index, other in enumerate(runs):
        folder = _parts(other.where.removesuffix(METRICS_FILE))
        # A path may be given relative to another folder than the run had: its end tells.
        inside = any(source[at : at + len(folder)] == folder for at in range(len(source) - len(folder) + 1))
        if other is not run and inside:
            return index
    return None


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]
