"""`k25-data index`: the index of each source of a data set, by which training finds its samples."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from k25_train.config.basics import is_url
from k25_train.config.data import DataConfig
from k25_train.config.sources import SourceFormat
from k25_train.data.commands.choice import add_choice, chosen_sources, num_workers
from k25_train.data.commands.indexing import index_source
from k25_train.data.formats.dataset import load_manifest
from k25_train.data.formats.index_layout import SourceHeader
from k25_train.data.formats.left_out import left_out_of
from k25_train.data.formats.source_files import SourceFiles
from k25_train.data.formats.source_index import SourceIndex
from k25_train.data.open_source import open_index
from k25_train.data.source_items import IndexItems
from k25_train.data.tokenizer import load_tokenizer
from k25_train.data.zero_vision import check_no_media
from k25_train.errors import ConfigError

PRINTED = 10
"""Samples left out of a source that are told when it is indexed. Our choice."""
_EPILOG = """\
A command that was interrupted goes on with the files that it has not done yet when it is given again. A
source whose index is of its files as they are now is left alone.
"""


def add(commands: Any, compose_data: Callable[[Sequence[str]], DataConfig]) -> None:
    """Declare the command; `compose_data` makes the configuration of the data of settings."""
    parser = commands.add_parser(
        "index",
        help="make the indexes that the sources of a data set have not got",
        description=(__doc__ or "").partition(":")[2].strip(),
        epilog=_EPILOG,
    )
    parser.add_argument(
        "settings",
        nargs="+",
        metavar="KEY=VALUE",
        help="data=NAME or data=FILE.yaml as for training, and other settings of the data",
    )
    add_choice(parser)
    parser.add_argument("--force", action="store_true", help="index again what is indexed already")
    parser.set_defaults(run=run, compose_data=compose_data)


def run(options: argparse.Namespace, console: Console) -> int:
    """Index the sources; returns the exit status."""
    data: DataConfig = options.compose_data(options.settings)
    names, workers = chosen_sources(options, data), num_workers(options)
    for name in names:
        _index(name, data, workers, options.force, console)
    return 0


def _index(name: str, data: DataConfig, workers: int, force: bool, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(escape(name), total=None)

        def progress(done: int, total: int, num_bytes: int) -> None:
            bar.update(task, completed=done, total=total)

        header = index_source(name, data, tokenizer_path(data), workers, progress, force=force)
    if header is None:
        console.print(f"{escape(name)}: has an index of its files as they are now")
    else:
        _print_index(name, header, data, console)
    if data.zero_vision:
        files = SourceFiles(name, data)
        index = open_index(files, load_tokenizer(tokenizer_path(data)), data.cache_dir)
        check_no_media(name, files.root, IndexItems(index, 0, len(index)))


def _print_index(name: str, header: SourceHeader, data: DataConfig, console: Console) -> None:
    console.print(
        f"{escape(name)}: {header.num_items:,} samples, {header.num_tokens:,} text tokens, "
        f"{header.num_media:,} images and videos in {header.num_shards:,} files; index "
        f"{SourceFiles(name, data).index}",
        markup=False,
    )
    _print_left_out(SourceFiles(name, data).index, console)


def _print_left_out(path: str, console: Console) -> None:
    if is_url(path):
        return  # `verify` tells them
    number, lines = left_out_of(SourceIndex.open(path).shards())
    for line in lines[:PRINTED]:
        console.print(f"  left out: {line}", markup=False)
    if number > len(lines[:PRINTED]):
        console.print(f"  left out: {number:,} in all; `verify` lists those of each file")


def tokenizer_path(data: DataConfig) -> str:
    """The vocabulary of a data set: `data.tokenizer`, or that of the first shard set among its sources.

    Raises ConfigError if there is neither.
    """
    if data.tokenizer is not None:
        return data.tokenizer
    for source in data.sources.values():
        if source.format is SourceFormat.shards:
            return load_manifest(data.path_of(source)).tokenizer_path
    raise ConfigError(
        "data.tokenizer: is null, and no source is a shard set, which would have one. Name a "
        "tokenizer.json or "
        "Kimi's tiktoken.model with data.tokenizer=FILE."
    )
