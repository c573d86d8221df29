"""Signals that ask a run to stop, agreed on by all ranks."""

import ctypes
import math
import os
import signal
import sys
import time
import types
from collections.abc import Sequence

import torch
import torch.distributed as dist

_SIGNAL_WHEN_PARENT_DIES = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


FOLDER_LOST = 1000
"""In place of a signal, above all of them: the run folder is no longer this run's."""
SAME_INTERRUPT_S = 1.5
"""Interrupts this close are one: a terminal and a launcher may both pass on a Ctrl-C."""


class StopRequest:
    """Remembers SIGTERM and SIGUSR1, which schedulers send before they take a node away, and SIGINT, which is
    Ctrl-C. A second Ctrl-C ends the process at once.

    If torchrun dies, its ranks get a SIGTERM too: they would outlive a killed torchrun, and write into the
    run folder together with the restarted job.
    """

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal, 0 if there was none; once ranks have agreed on one, the highest of any."""
        self._interrupted_s = math.inf
        """When the first SIGINT came, on the monotonic clock."""
        self._numbers = [signal.SIGTERM, signal.SIGUSR1]
        # A shell has background jobs ignore a Ctrl-C that is meant for others.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._numbers.append(signal.SIGINT)
        for number in self._numbers:
            signal.signal(number, self._remember)
        # Asks the kernel for a SIGTERM when torchrun, the parent, dies.
        if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
            ctypes.CDLL(None).prctl(_SIGNAL_WHEN_PARENT_DIES, signal.SIGTERM)

    def _remember(self, number: int, _frame: types.FrameType | None) -> None:
        now_s = time.monotonic()
        if number == signal.SIGINT:
            self._interrupted_s = min(self._interrupted_s, now_s)
            if now_s - self._interrupted_s > SAME_INTERRUPT_S:
                # Without a traceback, as if nothing had been handled.
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
        # Nothing else: the current step must be completed, as on every other rank.
        self.received = number

    def close(self) -> None:
        """Ignore the signals from now on.

        On exit, Python restores their default handlers: a late signal would kill a rank that has saved, and
        turn a run that stopped as asked into a failed one.
        """
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)

    def wanted(self, *, is_lost: bool) -> int:
        """What this rank asks for: 0 for nothing, the number of a signal, or `FOLDER_LOST`."""
        return FOLDER_LOST if is_lost else self.received

    def take(self, found: int) -> int:
        """Note the most that any rank wants, and return it."""
        # One that came while ranks waited for each other, or together with the loss, is for the next step.
        if 0 < found < FOLDER_LOST:
            self.received = found
        return found


def most_of_any_rank(own: Sequence[int], device: torch.device) -> list[int]:
    """The largest of each of some small numbers over all ranks, the same for all in the same step.

    One collective for all that ranks agree on between two steps; the host waits for it.
    """
    numbers = torch.tensor(own, device=device)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    found: list[int] = numbers.tolist()
    return found
