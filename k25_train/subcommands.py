"""Commands of the form `k25-NAME SUBCOMMAND`: their parser, and the console to which they print."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from k25_train.entry import exit_status
from k25_train.terminal import table_width


def parser_of(
    prog: str, doc: str | None, *adders: Callable[["argparse._SubParsersAction[Any]"], None]
) -> argparse.ArgumentParser:
    """The parser of a command.

    Args:
        prog: its name.
        doc: docstring of its module; what follows the first colon describes it.
        adders: each declares a subcommand that sets `run(options, console) -> exit status`.
    """
    parser = argparse.ArgumentParser(prog=prog, description=(doc or "").partition(":")[2].strip())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in adders:
        add(commands)
    return parser


def run_subcommand(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, *, output_goes_on: bool = False
) -> int:
    """Run the subcommand that is named: its `run(options, console)`; returns the exit status.

    Args:
        parser: of the command.
        arguments: words after the command's name; None for those that the process was started with.
        output_goes_on: see `exit_status`.
    """

    def body() -> int:
        options = parser.parse_args(arguments)
        console = Console(width=table_width(), highlight=False, soft_wrap=not sys.stdout.isatty())
        status: int = options.run(options, console)
        return status

    return exit_status(body, output_goes_on=output_goes_on)
