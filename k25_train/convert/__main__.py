"""`python -m k25_train.convert COMMAND` (also `k25-convert`): weights from and to Hugging Face folders."""

import sys
from collections.abc import Sequence

from k25_train.convert import export_command, import_command
from k25_train.subcommands import parser_of, run_subcommand


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 after an error."""
    words = sys.argv[1:] if arguments is None else arguments
    # Weights are converted whether or not somebody reads about it.
    converts = bool(words) and not {"-h", "--help"} & set(words)
    parser = parser_of("k25-convert", __doc__, import_command.add, export_command.add)
    return run_subcommand(parser, arguments, output_goes_on=converts)


if __name__ == "__main__":
    sys.exit(main())
