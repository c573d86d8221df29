"""What several commands about sources let a user choose."""

import argparse
import os
from typing import Any

from k25_train.config.data import DataConfig
from k25_train.errors import ConfigError


def add_choice(parser: Any) -> None:
    """Declare `--source` and `--workers`."""
    parser.add_argument("--source", action="append", metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (all cores); 0 works in this one")


def chosen_sources(options: argparse.Namespace, data: DataConfig) -> list[str]:
    """The names given, or all. Raises ConfigError for one that is no source."""
    names: list[str] = options.source or list(data.sources)
    for name in names:
        if name not in data.sources:
            raise ConfigError(f"--source {name}: is none of data.sources: {', '.join(data.sources)}.")
    return names


def num_workers(options: argparse.Namespace) -> int:
    """The number given, or one per core that this process may use."""
    return len(os.sched_getaffinity(0)) if options.workers is None else options.workers
