"""`k25-checkpoint inspect`: what a checkpoint holds, which layout wrote it, and what its tensors are."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console

from k25_train.checkpoint.commands.choice import WHERE, add_threads, chosen, num_threads
from k25_train.checkpoint.commands.contents import amounts, matching
from k25_train.checkpoint.commands.facts import Facts, facts_of
from k25_train.checkpoint.commands.inspect_tables import (
    alike_tables,
    amounts_table,
    data_table,
    facts_table,
    tensors_tables,
)
from k25_train.checkpoint.commands.progress import reading
from k25_train.checkpoint.commands.statistics import Statistics, statistics_of
from k25_train.checkpoint.commands.streaming import Job, in_threads, jobs, read
from k25_train.checkpoint.files.parts import TensorInfo
from k25_train.checkpoint.files.stored import StoredCheckpoint

_EPILOG = """\
Without --norms only manifest and headers are read. With it every byte of the tensors in question is, and
compared with its checksum; norms are summed in float64.
"""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "inspect",
        help="what is in a checkpoint",
        description=__doc__.partition(":")[2].strip(),
        epilog=_EPILOG,
    )
    parser.add_argument("checkpoint", help=WHERE)
    parser.add_argument(
        "--tensors",
        action="append",
        metavar="PATTERN",
        help="show each tensor in whose name it is, with * and ? as in a shell; may be repeated",
    )
    parser.add_argument(
        "--norms", action="store_true", help="read the tensors: norms, and what is not finite"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    add_threads(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Inspect; returns the exit status."""
    choice = chosen(options.checkpoint)
    if choice.note and not options.json:
        console.print(choice.note, markup=False, soft_wrap=True)
    stored = StoredCheckpoint.open(choice.folder)
    facts = facts_of(stored)
    names = matching(stored.tensors, options.tensors or ["*"])
    found: Mapping[str, Statistics] = {}
    if options.norms:
        threads = num_threads(options)
        found = norms_of(stored, names, threads, console, is_quiet=options.json)
    tensors = {name: stored.tensors[name] for name in names}
    if options.json:
        listed = tensors if options.tensors or options.norms else {}
        values = as_json(facts, stored.tensors, listed, found)
        console.print(json.dumps(values, allow_nan=False), markup=False, soft_wrap=True)
    else:
        show(facts, stored.tensors, tensors, found, console, lists_each=bool(options.tensors))
    return 0


def norms_of(
    stored: StoredCheckpoint, names: list[str], threads: int, console: Console, *, is_quiet: bool = False
) -> dict[str, Statistics]:
    """Statistics of tensors by name. Raises `DamagedCheckpointError` for what is not as it was written."""
    found = dict.fromkeys(names, Statistics())

    def look(job: Job) -> list[tuple[str, Statistics]]:
        pairs = zip(job.names, read(stored, job), strict=True)
        return [(name, statistics_of(tensor)) for name, tensor in pairs]

    total = sum(stored.tensors[name].num_bytes for name in names)
    with reading(console, "reading", total, is_quiet=is_quiet) as advance:
        for _, pieces in in_threads(look, jobs(stored.parts, names), threads):
            for name, piece in pieces:
                found[name] += piece
                advance(piece.num_elements * stored.tensors[name].dtype.itemsize)
    return found


def show(
    facts: Facts,
    everything: Mapping[str, TensorInfo],
    tensors: Mapping[str, TensorInfo],
    found: Mapping[str, Statistics],
    console: Console,
    *,
    lists_each: bool,
) -> None:
    """Print it as tables."""
    width = console.width
    console.print(facts_table(facts))
    if facts.data:
        console.print(data_table(facts, width))
    console.print(amounts_table(amounts(everything), width))
    make = tensors_tables if lists_each else alike_tables
    for table in make(tensors, found, width):
        console.print(table)


def as_json(
    facts: Facts,
    everything: Mapping[str, TensorInfo],
    listed: Mapping[str, TensorInfo],
    found: Mapping[str, Statistics],
) -> dict[str, Any]:
    """The same as one object of JSON."""
    parts = {
        part: {state.value: asdict(amount) for state, amount in row.items()}
        for part, row in amounts(everything).items()
    }
    tensors = [
        {"name": name, "dtype": dtype_of(info), "shape": list(info.shape)}
        | (found[name].as_json() if name in found else {})
        for name, info in listed.items()
    ]
    return facts.as_json() | {"num_tensors": len(everything), "parts": parts, "tensors": tensors}


def dtype_of(info: TensorInfo) -> str:
    """Its name without `torch.`."""
    return str(info.dtype).removeprefix("torch.")
