"""`python -m k25_train.environments COMMAND`: tasks by family, to be listed, looked at, and served."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = "k25_train.rl.environment_commands"
"""Judges are above environments, which know nothing of them: so what puts both together is named here."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 after an error, 1 where a reference solution fails."""
    status: int = importlib.import_module(COMMANDS).main(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
