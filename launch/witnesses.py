"""Collects what is known of how an attempt ended: files of its folder, srun's log, SLURM's states.

Whatever is missing or unreadable is left out: a verdict on less evidence is better than none.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from launch import ends
from launch.attempts import Attempts, read_log
from launch.blame.evidence import Evidence, KernelMessage, RankEnd, RankError, Stall, StepFailure
from launch.history import Attempt

STALL = "stall.json"
"""The watchdog's findings: in the run's `logs/`, and in the attempt's folder once they are collected."""
MAX_LOGS = 64
"""Logs of ranks that are read for what a library printed before it aborted."""
TAIL_BYTES = 1 << 16
_FAILED = re.compile(
    r"^srun: error: (?:Node failure on (?P<lost>\S+)|(?P<node>\S+): tasks? [\d,-]+: (?P<what>.*))$",
    re.MULTILINE,
)


def forget_stall(run: Path) -> None:
    """Before an attempt: drop the findings of an earlier one, such as of ranks that were started by hand."""
    with contextlib.suppress(OSError):
        (run / "logs" / STALL).unlink(missing_ok=True)


def collect(
    attempts: Attempts, attempt: Attempt, ranks_per_node: int, lost: Mapping[str, str], silent_start: str
) -> Evidence:
    """What is known of an attempt that ended.

    Args:
        attempts: the run's.
        attempt: the one that ended.
        ranks_per_node: ranks of each node.
        lost: node -> SLURM's state, of its nodes that are no longer usable.
        silent_start: the node that could not tell where ranks meet; empty if none.
    """
    folder = attempts.folder(attempt)
    of_nodes = [(node, line) for node, line in ends.lines_in(folder) if node in attempt.nodes]
    logs = (attempts.srun_log(attempt), attempts.preflight_log(attempt))
    ranks = set(range(len(attempt.nodes) * ranks_per_node))
    found = [end for node, line in of_nodes if (end := rank_end(node, line)) is not None]
    stall = stall_in(attempts.run, folder)
    return Evidence(
        nodes=attempt.nodes,
        ranks_per_node=ranks_per_node,
        run=str(attempts.run),
        lost=dict(lost),
        # Damaged lines may name ranks that there are not.
        ends=with_logs(folder, [end for end in found if {end.rank, *of_ranks(end)} <= ranks]),
        stall=stall if stall is None or {*stall.silent, *stall.culprits} <= ranks else None,
        kernel=[message for node, line in of_nodes for message in kernel_messages(node, line)],
        steps=[failure for log in logs if log.exists() for failure in step_failures(read_log(log))],
        silent_start=silent_start,
        addresses={
            node: strings(line.get("addresses")) for node, line in of_nodes if line.get("event") == "begin"
        },
        watched=[node for node, line in of_nodes if line.get("event") == "begin"],
    )


def rank_end(node: str, line: Mapping[str, Any]) -> RankEnd | None:
    """The end of a rank that a line tells; None for another line."""
    if line.get("event") != "end":
        return None
    try:
        return RankEnd(
            rank=int(line["rank"]), node=node, pid=int(line["pid"]), status=int(line["status"]),
            at_s=float(line["at_s"]), is_closing=bool(line["is_closing"]),
            error=rank_error(line.get("error")),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def of_ranks(end: RankEnd) -> tuple[int, ...]:
    """The ranks that its error names."""
    return () if end.error is None else end.error.of_ranks


def rank_error(told: object) -> RankError | None:
    """What a rank said of its error; None if it said nothing that can be read."""
    if not isinstance(told, dict):
        return None
    known = {field.name: bool if field.name.startswith("is_") else str for field in fields(RankError)}
    values = {name: value for name, value in told.items() if name in known}
    named = values.pop("of_ranks", [])
    if not {"kind", "text"} <= values.keys() or not isinstance(named, list):
        return None
    if not all(isinstance(value, known[name]) for name, value in values.items()):
        return None
    return RankError(**values, of_ranks=tuple(rank for rank in named if isinstance(rank, int)))


def kernel_messages(node: str, line: Mapping[str, Any]) -> Iterator[KernelMessage]:
    """Messages of a node's kernel that a line tells."""
    told = line.get("lines") if line.get("event") == "kernel" else None
    for each in told if isinstance(told, list) else ():
        if isinstance(each, dict):
            pid = each.get("pid")
            yield KernelMessage(
                node=node,
                kind=str(each.get("kind")),
                text=str(each.get("text")),
                pid=pid if isinstance(pid, int) else None,
            )


def step_failures(srun_log: str) -> list[StepFailure]:
    """Nodes and tasks of which srun's log reports a failure, in its order."""
    return [
        StepFailure(node=match["lost"], what="Node failure")
        if match["lost"]
        else StepFailure(node=match["node"], what=match["what"])
        for match in _FAILED.finditer(srun_log)
    ]


def stall_in(run: Path, folder: Path) -> Stall | None:
    """The watchdog's findings, which are moved to the attempt's folder; None if it reported no stall."""
    with contextlib.suppress(OSError):
        os.replace(run / "logs" / STALL, folder / STALL)
    try:
        found = json.loads((folder / STALL).read_text(encoding="utf-8"))
        return Stall(
            silent=tuple(map(int, found["silent"])),
            culprits=tuple(map(int, found["culprits"])),
            doing={int(rank): str(what) for rank, what in found["doing"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def with_logs(folder: Path, found: list[RankEnd]) -> list[RankEnd]:
    """The ends, with the last lines of the logs of ranks that aborted without a word: NCCL prints its own."""
    aborted = {end.rank for end in found if end.error is None and end.signal_name == "SIGABRT"}
    read = sorted(aborted)[:MAX_LOGS]
    said = {
        rank: RankError(kind="SIGABRT", text="", is_fault=True, raw=tail(folder / f"rank_{rank}.log"))
        for rank in read
    }
    return [replace(end, error=said[end.rank]) if end.rank in said else end for end in found]


def tail(log: Path) -> str:
    """The last lines of a log; empty if it cannot be read."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def strings(value: object) -> list[str]:
    """A list of texts; empty for anything else."""
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []
