"""Commands that run in the test's own process."""

import sys
from collections.abc import Callable


def status_of_command(main: Callable[[], object], *arguments: object) -> int:
    """Run the `main` of a command with these arguments; its exit status."""
    before, sys.argv = sys.argv, ["command", *map(str, arguments)]
    try:
        status = main()
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv = before
    assert status is None or isinstance(status, int), status
    return status or 0
