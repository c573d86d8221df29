"""Commands of a chain as child processes, which end as the chain does."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SIGNAL_WHEN_PARENT_DIES = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


def run_job(command: Sequence[str]) -> int:
    """Run a command to its end and return its status. Signals go to it alone, whose ranks save and end; if
    this process is killed, it is told to end, too."""
    # In a session of its own, else a terminal's Ctrl-C would reach it twice.
    child = subprocess.Popen(
        command,
        env={"OMP_NUM_THREADS": "1", **os.environ},
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )

    def forward(number: int, _: FrameType | None) -> None:
        if child.poll() is None:
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    for number in FORWARDED:
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SIGNAL_WHEN_PARENT_DIES, signal.SIGTERM)
