"""Options of the commands that submit runs."""

import argparse

MAX_RESTARTS = 3
"""Default of --max-restarts."""
MAX_LOG_MIB = 8
"""Default of --max-log-mib. A log and what came before it take at most five times that: 4,096 ranks that
flood theirs leave 170 GB."""


def argument_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The options of a command that submits."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="hydra overrides, as for k25-train")
    parser.add_argument("--dry-run", action="store_true", help="print everything, write and submit nothing")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=MAX_RESTARTS,
        metavar="N",
        help=f"consecutive restarts without progress before the run is given up ({MAX_RESTARTS})",
    )
    parser.add_argument(
        "--force", action="store_true", help="submit even if the plan does not fit into memory"
    )
    parser.add_argument(
        "--max-log-mib",
        type=int,
        default=MAX_LOG_MIB,
        metavar="MIB",
        help="size at which a log of the job is continued in a new file, of which the first and the last two "
        f"stay; 0 for never ({MAX_LOG_MIB})",
    )
    return parser
