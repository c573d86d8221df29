"""`python -m k25_train.checkpoint COMMAND` (`k25-checkpoint`): show, check, compare, prune checkpoints."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from k25_train.checkpoint.commands import diff, inspect, prune, verify
from k25_train.entry import exit_status
from k25_train.terminal import table_width

COMMANDS = (inspect, verify, diff, prune)
"""Modules with `add(commands)`, which declares a command that sets `run(options, console) -> exit status`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for faults or differences, 2 after an error."""

    def body() -> int:
        options = _parser().parse_args(arguments)
        console = Console(width=table_width(), highlight=False, soft_wrap=not sys.stdout.isatty())
        status: int = options.run(options, console)
        return status

    return exit_status(body)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="k25-checkpoint", description=__doc__.partition(":")[2].strip())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
