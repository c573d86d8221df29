"""torchrun as a child process that signals pass by: they go to its ranks, which save and stop.

torchrun itself would answer a signal by killing its ranks 30 s later, and print a traceback.
"""

import ctypes
import os
import signal
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SIGNAL_WHEN_PARENT_DIES = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


class Forwarding:
    """Runs one torchrun after another, and passes signals on to the ranks of the current one."""

    def __init__(self) -> None:
        """Handle `FORWARDED` from now on."""
        self.received: list[int] = []
        """Signals so far, also those that arrived while nothing ran."""
        self._child: subprocess.Popen[bytes] | None = None
        for number in FORWARDED:
            signal.signal(number, self._forward)

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run torchrun and return its exit status; signals that came before are passed on as well.

        If this process is killed, torchrun gets SIGHUP and ends its ranks.
        """
        # In a session of its own, else a terminal's Ctrl-C would reach torchrun as well.
        child = subprocess.Popen(
            command, env=dict(environment), start_new_session=True, preexec_fn=_end_with_parent
        )
        early, self._child = list(self.received), child
        for number in early:
            send(child.pid, number)
        status = child.wait()
        self._child = None
        return status if status >= 0 else 128 - status

    def _forward(self, number: int, _frame: types.FrameType | None) -> None:
        self.received.append(number)
        if self._child is not None:
            send(self._child.pid, number)


def run_forwarding(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run one torchrun and return its exit status; `FORWARDED` signals to this process go to its ranks."""
    return Forwarding().run(command, environment)


def send(torchrun: int, number: int) -> None:
    """Send a signal to torchrun's ranks; before there are any, end torchrun."""
    ranks = children(torchrun)
    for pid in ranks or [torchrun]:
        try:
            os.kill(pid, number if ranks else signal.SIGTERM)
        except ProcessLookupError:
            continue


def children(parent: int) -> list[int]:
    """Processes whose parent this is."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (
                    (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
                )
            except OSError:
                # It has ended.
                continue
            if int(fields[1]) == parent:
                found.append(int(entry.name))
    return found


def _end_with_parent() -> None:
    """In the child: default signals, and SIGHUP when the parent dies."""
    for number in FORWARDED:
        signal.signal(number, signal.SIG_DFL)
    hang_up_with_parent()


def hang_up_with_parent() -> None:
    """Have this process get SIGHUP when its parent dies."""
    end_with(signal.SIGHUP)


def end_with(number: signal.Signals) -> None:
    """Have this process get a signal when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SIGNAL_WHEN_PARENT_DIES, number)
