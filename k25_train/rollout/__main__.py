"""`python -m k25_train.rollout COMMAND` (also `k25-rollout`): engines, a gateway, runs' rollouts."""

import sys
from collections.abc import Sequence

from k25_train.rollout.gateway.standalone import command as gateway_command
from k25_train.rollout.overview import list_command, replay_command, show_command, stats_command
from k25_train.rollout.serve import command as serve_command
from k25_train.subcommands import parser_of, run_subcommand


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 after an error."""
    words = sys.argv[1:] if arguments is None else arguments
    # A server serves whether or not somebody reads what it prints.
    serves = bool(words) and words[0] in ("serve", "gateway") and not {"-h", "--help"} & set(words)
    parser = parser_of(
        "k25-rollout",
        __doc__,
        serve_command.add,
        gateway_command.add,
        list_command.add,
        show_command.add,
        stats_command.add,
        replay_command.add,
    )
    return run_subcommand(parser, arguments, output_goes_on=serves)


if __name__ == "__main__":
    sys.exit(main())
