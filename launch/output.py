"""Everything a process prints into a file of its own."""

import os
from pathlib import Path


def redirect(log: Path) -> None:
    """Append stdout and stderr to `log` from now on, also of native code and of what the process becomes."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
