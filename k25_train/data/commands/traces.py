"""`k25-data traces`: conversations in which code answers questions about images that the model never sees."""

import argparse
import time
from pathlib import Path

from rich.console import Console

from k25_train.data.traces.conversation import TraceOptions
from k25_train.data.traces.families.registry import FAMILIES
from k25_train.data.traces.generate import Counts, generate


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    plain = TraceOptions()
    parser = commands.add_parser(
        "traces", help="make tool-use traces: code about images that the model never sees, run for real"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make, or to go on with")
    parser.add_argument("--count", type=int, default=10_000, help="traces to make (%(default)s)")
    parser.add_argument("--seed", type=int, default=plain.seed, help="of all that is drawn (%(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes, 0 for this one (%(default)s)")
    parser.add_argument(
        "--family", action="append", metavar="NAME", help=f"may be repeated ({', '.join(FAMILIES)})"
    )
    parser.add_argument(
        "--difficulty", type=int, action="append", metavar="N", help="may be repeated (1, 2, 3)"
    )
    parser.add_argument(
        "--slips",
        type=float,
        default=plain.slips,
        help="share with a mistake and its correction (%(default)s)",
    )
    parser.add_argument(
        "--heldout", type=float, default=plain.heldout, help="share that is held out (%(default)s)"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, console: Console) -> int:
    started_s = time.monotonic()
    plain = TraceOptions()
    asked = TraceOptions(
        seed=options.seed,
        families=tuple(options.family or plain.families),
        difficulties=tuple(options.difficulty or plain.difficulties),
        slips=options.slips,
        heldout=options.heldout,
    )
    with console.status("starting") as status:
        counts = generate(
            asked,
            options.count,
            options.out,
            options.workers,
            lambda done, of: status.update(f"{done:,} of {of:,} traces"),
        )
    took_s = time.monotonic() - started_s
    console.print(f"{options.out}: {told(counts)}, in {took_s:.0f} s")
    return 0


def told(counts: Counts) -> str:
    """What was made, in one line."""
    num_discarded = sum(counts.discarded.values())
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(counts.discarded.items()))
    return (
        f"{counts.written.get('train', 0):,} traces to train on, {counts.written.get('heldout', 0):,} held "
        f"out, of {len(counts.by_family)} families; {num_discarded:,} thrown away"
        + (f" ({reasons})" if reasons else "")
    )
