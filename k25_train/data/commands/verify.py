"""`k25-data verify`: reads all of a data set again and names every file and sample that is faulty."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from k25_train.config.data import DataConfig
from k25_train.data.commands.choice import add_choice, chosen_sources, num_workers
from k25_train.data.commands.index import tokenizer_path
from k25_train.data.smoke_set.verify import verify_dataset
from k25_train.data.verify.sources import SourceCheck, verify_source

_EPILOG = """\
The exit status is 0 without faults, 1 with, and 2 where something could not be looked at. What an index left
out when it was made is a fault, too. Names that samples of several files have are only warned of, unless the
samples are equal.
"""


def add(commands: Any, compose_data: Callable[[Sequence[str]], DataConfig], default_directory: str) -> None:
    """Declare the command; without settings it verifies the shard set in `default_directory`."""
    parser = commands.add_parser(
        "verify",
        help="read everything again and name every faulty file and sample",
        description=(__doc__ or "").partition(":")[2].strip(),
        epilog=_EPILOG,
    )
    parser.add_argument(
        "settings",
        nargs="*",
        default=[default_directory],
        metavar="KEY=VALUE | FOLDER",
        help="data=NAME or data=FILE.yaml as for training, or the folder of a shard set (%(default)s)",
    )
    add_choice(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.set_defaults(run=run, compose_data=compose_data)


def run(options: argparse.Namespace, console: Console) -> int:
    """Verify; returns the exit status."""
    first = options.settings[0]
    if len(options.settings) == 1 and "=" not in first:
        checks = [_folder(first, console, is_quiet=options.json)]
    else:
        data: DataConfig = options.compose_data(options.settings)
        names, workers = chosen_sources(options, data), num_workers(options)
        checks = [_source(name, data, workers, console, is_quiet=options.json) for name in names]
    num_faults = sum(len(check.faults) for check in checks)
    if options.json:
        found = {"num_faults": num_faults, "sources": [asdict(check) for check in checks]}
        console.print(json.dumps(found, ensure_ascii=False), markup=False, soft_wrap=True)
    else:
        _print(checks, console)
        console.print(f"{escape(first)}: {num_faults or 'no'} fault{'s' * (num_faults != 1)} found")
    return 1 if num_faults else 0


def _folder(directory: str, console: Console, *, is_quiet: bool) -> SourceCheck:
    def report(line: str) -> None:
        if not is_quiet:
            console.print(escape(line))

    return SourceCheck(directory, "shards", faults=verify_dataset(directory, report))


def _source(name: str, data: DataConfig, workers: int, console: Console, *, is_quiet: bool) -> SourceCheck:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=is_quiet or not console.is_terminal) as bar:
        task = bar.add_task(escape(name), total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total or None)

        return verify_source(name, data, tokenizer_path(data), workers, report)


def _print(checks: list[SourceCheck], console: Console) -> None:
    for check in checks:
        for fault in check.faults:
            console.print(escape(fault), soft_wrap=True)
        for warning in check.warnings:
            console.print(f"warning: {escape(warning)}", soft_wrap=True)
    if len(checks) == 1 and not checks[0].num_shards:
        return
    table = Table("source", "format", "files", "samples", "media", "GB read", "faults")
    for check in checks:
        numbers = (check.num_shards, check.num_items, check.num_media)
        table.add_row(
            escape(check.source),
            check.format,
            *(f"{number:,}" for number in numbers),
            f"{check.num_bytes / 1e9:,.3f}",
            f"{len(check.faults):,}",
        )
    console.print(table)
