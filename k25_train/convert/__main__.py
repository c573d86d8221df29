"""`python -m k25_train.convert COMMAND` (also `k25-convert`): weights from and to Hugging Face folders."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from k25_train.convert import export_command, import_command
from k25_train.entry import exit_status
from k25_train.terminal import table_width

COMMANDS = (import_command, export_command)
"""Modules with `add(commands)`, which declares a command that sets `run(options, console) -> exit status`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 after an error."""

    def body() -> int:
        options = _parser().parse_args(arguments)
        console = Console(width=table_width(), highlight=False, soft_wrap=not sys.stdout.isatty())
        status: int = options.run(options, console)
        return status

    words = sys.argv[1:] if arguments is None else arguments
    # Weights are converted whether or not somebody reads about it.
    return exit_status(body, output_goes_on=bool(words) and not {"-h", "--help"} & set(words))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="k25-convert", description=__doc__.partition(":")[2].strip())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
