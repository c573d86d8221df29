"""`k25-checkpoint verify`: reads all of some checkpoints, and names every file and tensor that is faulty."""

import argparse
import json
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from k25_train.checkpoint.commands.checks import Check, check
from k25_train.checkpoint.commands.choice import WHERE, Choice, add_threads, chosen, num_threads
from k25_train.checkpoint.commands.progress import reading
from k25_train.checkpoint.commands.sizes import in_units
from k25_train.checkpoint.integrity import damaged
from k25_train.checkpoint.manifest import read_manifest
from k25_train.errors import CheckpointError
from k25_train.tables import fitting_table

MAX_TOLD = 20
"""Faults of a checkpoint that are told in words; --json has all. Our choice."""
_EPILOG = """\
Compared are the sizes of all files, their headers, and every block of every tensor with its checksum (in
older formats, each file with its SHA-256); every element must be there once, configuration and position in
the data readable, all values finite. The exit status is 0 without faults, 1 with, and 2 where something is no
checkpoint. One that says itself that it is unsound is not faulty for that.
"""


@dataclass(frozen=True, slots=True)
class Result:
    """A check, how long it took, and what to do."""

    check: Check
    took_s: float
    remedy: str
    """Empty without faults."""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "verify",
        help="read everything and name every faulty file and tensor",
        description=(__doc__ or "").partition(":")[2].strip(),
        epilog=_EPILOG,
    )
    parser.add_argument("checkpoints", nargs="+", metavar="checkpoint", help=WHERE)
    parser.add_argument("--sizes", action="store_true", help="read no tensors: sizes, headers, small files")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    add_threads(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Verify; returns the exit status."""
    threads = num_threads(options)
    choices = [chosen(text) for text in options.checkpoints]
    results = [_verify(each, threads, options, console) for each in choices]
    num_faults = sum(len(each.check.faults) for each in results)
    if options.json:
        values = {"num_faults": num_faults, "checkpoints": [as_json(each) for each in results]}
        console.print(json.dumps(values, allow_nan=False), markup=False, soft_wrap=True)
    else:
        _print(results, console)
    return 1 if num_faults else 0


def _verify(choice: Choice, threads: int, options: argparse.Namespace, console: Console) -> Result:
    if choice.note and not options.json:
        console.print(choice.note, markup=False, soft_wrap=True)
    started_s = time.monotonic()
    with reading(console, choice.folder.name, _num_bytes(choice), is_quiet=options.json) as advance:
        found = check(choice.folder, threads, advance, reads_content=not options.sizes)
    remedy = ""
    if found.faults:
        # Words of the error that a run would end with.
        remedy = str(damaged(choice.folder, "")).partition("; ")[2]
    return Result(found, time.monotonic() - started_s, remedy)


def _num_bytes(choice: Choice) -> int:
    try:
        return sum(file.num_bytes for file in read_manifest(choice.folder).files.values())
    except CheckpointError:
        return 0


def as_json(result: Result) -> dict[str, Any]:
    """One checkpoint of `--json`."""
    found = result.check
    return {
        "folder": str(found.folder),
        "format": found.manifest.version if found.manifest else None,
        "step": found.manifest.step if found.manifest else None,
        "sound": found.manifest.is_sound if found.manifest else None,
        "num_tensors": found.num_tensors,
        "num_bytes_read": found.num_bytes,
        "took_s": round(result.took_s, 3),
        "faults": found.faults,
        "notes": found.notes,
        "remedy": result.remedy,
    }


def _print(results: list[Result], console: Console) -> None:
    for result in results:
        found = result.check
        for fault in found.faults[:MAX_TOLD]:
            console.print(escape(fault), soft_wrap=True)
        if len(found.faults) > MAX_TOLD:
            console.print(f"and {len(found.faults) - MAX_TOLD:,} more faults: --json has all of them")
        for note in found.notes:
            console.print(f"note: {found.folder} {escape(note)}", soft_wrap=True)
        if result.remedy:
            console.print(f"  -> {escape(result.remedy)}", soft_wrap=True)
    rows = [_row(each) for each in results]
    least = ("format", "tensors", "GB/s", "holds")
    table = fitting_table(
        "", rows, console.width, least=least, left=("checkpoint", "holds"), wraps=("checkpoint",)
    )
    console.print(table)


def _row(result: Result) -> dict[str, str]:
    found, manifest = result.check, result.check.manifest
    holds = ""
    if manifest is not None:
        what = f"step {manifest.step:,}" if manifest.kind == "run" else "weights"
        holds = what if manifest.is_sound else f"{what}, unsound"
    return {
        "checkpoint": str(found.folder),
        "format": str(manifest.version) if manifest else "",
        "holds": holds,
        "files": f"{len(manifest.files):,}" if manifest else "",
        "tensors": f"{found.num_tensors:,}",
        "read": in_units(found.num_bytes),
        "GB/s": f"{found.num_bytes / 1e9 / max(result.took_s, 1e-9):.2f}",
        "faults": f"{len(found.faults):,}" if found.faults else "none",
    }
