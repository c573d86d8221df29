"""`python -m k25_train.metrics COMMAND` (`k25-metrics`): watch a run, and compare runs."""

import sys
from collections.abc import Sequence

from k25_train.metrics.compare import command as compare
from k25_train.metrics.watch import command as watch
from k25_train.subcommands import parser_of, run_subcommand


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 after an error."""
    return run_subcommand(parser_of("k25-metrics", __doc__, watch.add, compare.add), arguments)


if __name__ == "__main__":
    sys.exit(main())
