"""`stats data=NAME`: what the sources of a data set are, as tables and a picture, from indexes alone."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from k25_train.config.schema import Config
from k25_train.data.loader import DataLoader
from k25_train.data.overview.plots import draw
from k25_train.data.overview.statistics import statistics
from k25_train.data.overview.table import media_table, sources_table


def add(commands: Any, config_of: Callable[[Sequence[str]], Config]) -> None:
    """Declare the command."""
    parser = commands.add_parser("stats", help="what the sources of a data set are, from their indexes alone")
    parser.add_argument("overrides", nargs="*", default=["data=smoke"], help="data=NAME and other overrides")
    parser.add_argument("--png", metavar="FILE", help="draw lengths, sizes and shapes into this file")
    parser.set_defaults(run=show_statistics, config_of=config_of)


def show_statistics(options: argparse.Namespace, console: Console) -> int:
    """Print the tables and write the picture."""
    config: Config = options.config_of(options.overrides)
    with DataLoader(config.data, config.train, config.model.vision) as loader:
        sources = [statistics(name, index) for name, index in loader.indexes().items()]
    console.print(sources_table(sources, console.width))
    if any(each.num_media for each in sources):
        console.print(media_table(sources, console.width))
    if options.png is not None:
        path = Path(options.png)
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(sources, path, " ".join(options.overrides))
        console.print(f"wrote {path}")
    return 0
