"""`python -m k25_train.checkpoint COMMAND` (`k25-checkpoint`): show, check, compare, prune checkpoints."""

import sys
from collections.abc import Sequence

from k25_train.checkpoint.commands import diff, inspect, prune, verify
from k25_train.subcommands import parser_of, run_subcommand


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for faults or differences, 2 after an error."""
    parser = parser_of("k25-checkpoint", __doc__, inspect.add, verify.add, diff.add, prune.add)
    return run_subcommand(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
