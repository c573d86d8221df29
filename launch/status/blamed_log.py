"""The log that says why a run has stalled or ended: that of the rank to blame, as far as it is known."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.history import Outcome
from launch.status.facts import Facts, Record
from launch.status.files import Reader
from launch.status.judging import TROUBLED, State

NUM_LINES, LINE_LENGTH = 8, 300
END_BYTES = 64 << 10
INNOCENT = (Outcome.finished, Outcome.stopped)
MAX_RANKS = 64
"""Logs of ranks that are looked into where nobody says who failed first."""
_FIRST_RANK = re.compile(r"rank (\d+) failed first")
_ERROR = re.compile(
    r"\b\w*(?:Error|Exception)\b: |Traceback|STALL|Killed|SIG[A-Z]+\b|out of memory", re.IGNORECASE
)
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlamedLog:
    """The end of a log."""

    file: str
    """Its path."""
    attempt: int
    lines: list[str]
    """The last lines that are not empty, without control characters."""


def blamed_log(facts: Facts, state: State) -> BlamedLog | None:
    """The log of whoever ended the newest attempt that ended badly; None if none did."""
    for record in reversed(facts.records):
        outcome = record.values.get("outcome")
        if outcome in INNOCENT:
            return None
        if outcome is None and state not in TROUBLED:
            # It is running; what ended the one before is still worth a look.
            continue
        for path in candidates(record):
            lines = last_lines(path)
            if lines:
                return BlamedLog(file=str(path), attempt=record.number, lines=lines)
    return None


def candidates(record: Record) -> Iterator[Path]:
    """Logs of an attempt, the most telling one first."""
    values, folder = record.values, record.folder
    blame = values.get("blame")
    rank, node = (blame.get("rank"), blame.get("node")) if isinstance(blame, dict) else (None, None)
    if isinstance(rank, int):
        yield folder / f"rank_{rank}.log"
    if values.get("unfit"):
        yield folder / "preflight.log"
    node = node or values.get("first_to_fail")
    if isinstance(node, str) and "/" not in node and node.isprintable():
        own = folder / f"node_{node}.log"
        match = _FIRST_RANK.search("\n".join(last_lines(own)))
        if match is not None:
            yield folder / f"rank_{match[1]}.log"
        yield own
    # Nobody was named: the first rank whose log ends with an error.
    ranks = sorted(folder.glob("rank_*.log"), key=rank_of)[:MAX_RANKS]
    yield from (path for path in ranks if any(_ERROR.search(line) for line in last_lines(path)))
    yield from (folder / name for name in ("srun.log", "preflight.log", "preflight_srun.log"))
    yield from ranks[:1]


def rank_of(log: Path) -> int:
    """The rank that a log is of."""
    digits = log.stem.removeprefix("rank_")
    return int(digits) if digits.isdecimal() else 1 << 62


def last_lines(path: Path) -> list[str]:
    """The last lines of a log, as a terminal may show them."""
    text = Reader().end_of(path, END_BYTES).decode(errors="replace")
    lines = (printable(line) for line in re.split(r"[\n\r]", text)[-1000:])
    return [line for line in lines if line.strip()][-NUM_LINES:]


def printable(line: str) -> str:
    """A line without what would move a terminal's cursor, and not endless."""
    clean = "".join(sign if sign.isprintable() else " " for sign in _ESCAPES.sub("", line)).rstrip()
    return clean if len(clean) <= LINE_LENGTH else clean[: LINE_LENGTH - 1] + "…"
