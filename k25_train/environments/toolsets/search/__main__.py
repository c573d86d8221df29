"""`python -m k25_train.environments.toolsets.search COMMAND`: documents of installed packages."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from k25_train.environments.toolsets.search.corpus import documents, missing
from k25_train.environments.toolsets.search.index import Index, build
from k25_train.errors import ConfigError
from k25_train.subcommands import parser_of, run_subcommand


def _add_build(commands: "argparse._SubParsersAction[Any]") -> None:
    parser = commands.add_parser("build", help="write an index of what packages say of themselves")
    parser.add_argument("index", type=Path, help="the file, e.g. docs.sqlite")
    parser.add_argument("--packages", nargs="*", default=[], help="which; all installed ones without")
    parser.set_defaults(run=_build)


def _build(options: argparse.Namespace, console: Console) -> int:
    if gone := missing(options.packages):
        raise ConfigError(
            f"--packages: {', '.join(gone)}: not installed\n  -> install them, or leave them out"
        )
    count = build(options.index, documents(options.packages))
    console.print(
        f"{options.index}: {count} documents, digest {Index(options.index).digest[:16]}", markup=False
    )
    return 0


def _add_query(commands: "argparse._SubParsersAction[Any]") -> None:
    parser = commands.add_parser("query", help="search an index")
    parser.add_argument("index", type=Path)
    parser.add_argument("query")
    parser.add_argument("-k", type=int, default=5, help="how many documents")
    parser.set_defaults(run=_query)


def _query(options: argparse.Namespace, console: Console) -> int:
    for hit in Index(options.index).search(options.query, options.k):
        console.print(f"[{hit.id}] {hit.title}\n    {hit.excerpt}", markup=False)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 after an error."""
    return run_subcommand(parser_of("k25-search", __doc__, _add_build, _add_query), arguments)


if __name__ == "__main__":
    sys.exit(main())
