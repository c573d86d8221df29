"""`k25-checkpoint diff`: two checkpoints compared, tensor by tensor, whatever layouts wrote them."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from k25_train.checkpoint.commands.choice import WHERE, add_threads, chosen, num_threads
from k25_train.checkpoint.commands.comparison import (
    Pair,
    Values,
    compare,
    config_that_differs,
    facts_that_differ,
    pairs_of,
)
from k25_train.checkpoint.commands.contents import matching
from k25_train.checkpoint.commands.facts import facts_of
from k25_train.checkpoint.commands.progress import reading
from k25_train.checkpoint.files.stored import StoredCheckpoint
from k25_train.errors import ConfigError
from k25_train.tables import fitting_table

MAX_SHOWN = 40
_EPILOG = """\
Columns: "max abs" is the largest |a - b|, "relative" that over the largest |a|, "cosine" of the angle
between both. Tensors are equal if their bits are; of two dtypes, values are compared. The exit status is 0
if all tensors are equal, or within --tolerance, 1 if not, and 2 where something is no checkpoint.
"""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "diff",
        help="compare two checkpoints, tensor by tensor",
        description=(__doc__ or "").partition(":")[2].strip(),
        epilog=_EPILOG,
    )
    parser.add_argument("first", help=WHERE)
    parser.add_argument("second", help="the same")
    parser.add_argument(
        "--tensors",
        action="append",
        metavar="PATTERN",
        help="only tensors in whose names it is, with * and ? as in a shell; may be repeated",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="T",
        help="relative difference that counts as none (0)",
    )
    parser.add_argument(
        "--limit", type=int, default=MAX_SHOWN, metavar="N", help="tensors that are shown (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    add_threads(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Compare; returns the exit status."""
    if not 0 <= options.tolerance < float("inf"):
        raise ConfigError(f"--tolerance {options.tolerance}: must be a number from 0 on")
    threads = num_threads(options)
    choices = [chosen(options.first), chosen(options.second)]
    one, other = (StoredCheckpoint.open(each.folder) for each in choices)
    pairs, note = pairs_of(one, other)
    names = set(matching([pair.name for pair in pairs], options.tensors or ["*"]))
    pairs = [pair for pair in pairs if pair.name in names]
    total = sum(pair.one.num_bytes for pair in pairs if pair.one is not None and pair.other is not None)
    with reading(console, "comparing", total, is_quiet=options.json) as advance:
        compared = compare(one, other, pairs, threads, advance)
    facts = facts_that_differ(facts_of(one), facts_of(other))
    config = config_that_differs(one, other)
    num_different = sum(pair.differs(options.tolerance) for pair in compared)
    if options.json:
        values = {
            "first": str(one.folder),
            "second": str(other.folder),
            "num_compared": len(compared),
            "num_different": num_different,
            "facts": [_as_json(each) for each in facts],
            "config": [_as_json(each) for each in config],
            "tensors": [pair.as_json() for pair in compared],
        }
        console.print(json.dumps(values, allow_nan=False), markup=False, soft_wrap=True)
    else:
        for each in (*(choice.note for choice in choices), note):
            if each:
                console.print(each, markup=False, soft_wrap=True)
        _print(facts, config, compared, options, console)
    return 1 if num_different else 0


def _as_json(values: Values) -> dict[str, Any]:
    return {"name": values.name, "first": values.one, "second": values.other}


def _print(
    facts: Sequence[Values],
    config: Sequence[Values],
    compared: Sequence[Pair],
    options: argparse.Namespace,
    console: Console,
) -> None:
    for title, differing in (("What they say of themselves", facts), ("Configuration", config)):
        if differing:
            console.print(_values_table(title, differing, console.width))
    different = [pair for pair in compared if pair.differs(options.tolerance)]
    if different:
        console.print(_tensors_table(different[: options.limit], console.width))
    if len(different) > options.limit:
        console.print(
            f"and {len(different) - options.limit:,} more tensors: --limit shows them, --json has all"
        )
    alike = "equal" if not options.tolerance else f"within {options.tolerance:g} of each other"
    console.print(f"{len(compared) - len(different):,} of {len(compared):,} tensors are {alike}")


def _values_table(title: str, differing: Sequence[Values], width: int) -> Table:
    rows = [{"": each.name, "first": _text(each.one), "second": _text(each.other)} for each in differing]
    return fitting_table(title, rows, width, left=("", "first", "second"), wraps=("first", "second"))


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _tensors_table(pairs: Sequence[Pair], width: int) -> Table:
    rows = []
    for pair in pairs:
        found = pair.difference
        numbers = {"max abs": "", "relative": "", "cosine": ""}
        if found is not None:
            numbers = {
                "max abs": f"{found.max_abs:.3g}",
                "relative": f"{found.relative:.3g}",
                "cosine": f"{found.cosine:.6f}",
            }
        rows.append({"tensor": pair.name, "differs": pair.what} | numbers)
    return fitting_table(
        "Tensors, the largest differences first",
        rows,
        width,
        least=("max abs",),
        left=("tensor", "differs"),
        wraps=("tensor", "differs"),
    )
