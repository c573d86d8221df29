"""Output of processes: each rank's goes to a separate file, the supervisor's lines have time stamps."""

import os
import time
from pathlib import Path


def redirect(log: Path) -> None:
    """Append stdout and stderr to `log` from now on, including those of native code and after an exec."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


def log(text: str) -> None:
    """Print one line of supervisor.log."""
    print(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}", flush=True)
