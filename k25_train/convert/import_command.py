"""`k25-convert import`: a Hugging Face folder as a checkpoint of weights, in bounded memory."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from k25_train.config.basics import is_url
from k25_train.convert.arguments import positive
from k25_train.convert.importing import MODEL_FILE, Import, Options
from k25_train.convert.mapping import Named
from k25_train.errors import CheckpointError
from k25_train.units import format_duration

LINE_S = 30.0
"""Seconds between two lines where there is no terminal."""
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
_EPILOG = """\
A command that was interrupted goes on where it was when it is given again, with any number of workers. On
several nodes that share OUT, give each the same command with its own --node; the last to finish completes the
checkpoint.
A run starts from it with checkpoint.init_from=OUT.
"""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "import",
        help="weights of a Hugging Face folder as a checkpoint to start from",
        description=__doc__.partition(":")[2].strip() if __doc__ else None,
        epilog=_EPILOG,
    )
    parser.add_argument("source", metavar="SRC", help="folder with config.json and safetensors files")
    parser.add_argument("out", metavar="OUT", help="checkpoint to make")
    parser.add_argument(
        "--model",
        metavar="NAME|FILE",
        help="model of conf/model, or YAML file, that it must be (as config.json says)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bf16",
        help="of the weights; the router's bias is float32 (%(default)s)",
    )
    parser.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="PATTERN",
        help="names of SRC that are not taken, as *.x",
    )
    parser.add_argument(
        "--allow-missing",
        action="append",
        default=[],
        metavar="PATTERN",
        help="names of ours that may be missing",
    )
    parser.add_argument(
        "--memory-gib",
        type=positive(float),
        default=4.0,
        metavar="N",
        help="most memory of all processes on this node together (%(default)s)",
    )
    parser.add_argument(
        "--workers", type=positive(int), metavar="N", help="processes (as many as cores and memory allow)"
    )
    parser.add_argument("--node", type=int, default=0, metavar="I", help="number of this node, from 0")
    parser.add_argument("--num-nodes", type=positive(int), default=1, metavar="N", help="nodes (%(default)s)")
    parser.add_argument(
        "--restart", action="store_true", help="drop what an interrupted import left at OUT.partial"
    )
    parser.add_argument("--dry-run", action="store_true", help="tell what would be done")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Import and print a summary; returns the exit status."""
    if not 0 <= options.node < options.num_nodes:
        raise CheckpointError(
            f"--node {options.node}: must be 0 to {options.num_nodes - 1}, as --num-nodes says"
        )
    for place in (options.source, options.out):
        if is_url(place):
            raise CheckpointError(f"{place}: must be a folder: copy what is in an object store to a disk")
    started_s = time.monotonic()
    planned = Import(
        Options(
            source=Path(options.source),
            out=Path(os.path.abspath(options.out)),
            model=options.model,
            dtype=DTYPES[options.dtype],
            named=Named(options.leave_out, options.allow_missing),
            memory_bytes=round(options.memory_gib * 2**30),
            num_workers=options.workers,
            node=options.node,
            num_nodes=options.num_nodes,
        )
    )
    print_mapping(planned, console)
    if planned.exists():
        console.print(f"exists already: {escape(str(planned.options.out))}", soft_wrap=True)
        return 0
    if options.dry_run:
        return 0
    try:
        outcome = planned.run(Bar(console), restart=options.restart)
    except KeyboardInterrupt:
        console.print("what is done is kept: the same command goes on from there", soft_wrap=True)
        raise
    print_result(planned, outcome, time.monotonic() - started_s, console)
    return 0


def print_mapping(planned: Import, console: Console) -> None:
    """What becomes of which tensors, and what the model is."""
    table = Table("in SRC", "tensors", "format", "ours", box=None, header_style="bold")
    table.columns[1].justify = "right"
    for row in planned.mapping.rows:
        target = f"{row.target} ({row.change.value})" if row.change.value else row.target
        table.add_row(escape(row.source), f"{row.count:,}", ", ".join(sorted(row.formats)), escape(target))
    console.print(table)
    for name in planned.mapping.missing:
        console.print(f"missing, as allowed: {escape(name)}", soft_wrap=True)
    kinds = {str(each.dtype).removeprefix("torch.") for each in planned.mapping.tensors}
    console.print(
        f"{planned.model.name}: {', '.join(planned.parts)}; {len(planned.mapping.tensors):,} tensors, "
        f"{decimal(planned.num_bytes)} ({', '.join(sorted(kinds))}), in {len(planned.units):,} files",
        soft_wrap=True,
    )


def print_result(planned: Import, outcome: str, took_s: float, console: Console) -> None:
    """What there is now, and how to go on."""
    own_bytes = sum(unit.num_bytes for unit in planned.own_units)
    out = escape(str(planned.options.out))
    console.print(f"{out}: {outcome}; {decimal(own_bytes)} here in {format_duration(took_s)}", soft_wrap=True)
    if outcome == "complete":
        console.print(f"to start from it: checkpoint.init_from={out}", soft_wrap=True)
        if (planned.options.out / MODEL_FILE).exists():
            console.print(f"its model: model={out}/{MODEL_FILE}", soft_wrap=True)


class Bar:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def start(self, total: int, done: int) -> None:
        """Bytes of this node, of which some were done before."""
        self._total, self._before = total, done
        self._started_s = self._told_s = time.monotonic()
        if done:
            self._console.print(
                f"going on from {decimal(done)} of {decimal(total)} that are done", soft_wrap=True
            )
        self._live = Progress(
            TextColumn("[bold]import"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._live.add_task("import", total=max(total, 1), completed=done, status="")
        self._live.start()

    def show(self, done: int) -> None:
        """Bytes that are done."""
        now_s = time.monotonic()
        new, took_s = done - self._before, max(now_s - self._started_s, 1e-3)
        left = f"  {format_duration((self._total - done) * took_s / new)} left" if new else ""
        status = f"{decimal(round(new / took_s))}/s{left}"
        self._live.update(self._task, completed=done, status=status)
        if not self._console.is_terminal and now_s - self._told_s >= LINE_S:
            self._told_s = now_s
            self._console.print(f"import {done / max(self._total, 1):.1%}  {status}", soft_wrap=True)

    def stop(self) -> None:
        """No more to show."""
        self._live.stop()
