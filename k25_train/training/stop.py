"""Signals that ask a run to stop, agreed on by all ranks."""

import ctypes
import os
import signal
import sys
import types

import torch
import torch.distributed as dist

_SIGNAL_WHEN_PARENT_DIES = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


class StopRequest:
    """Remembers SIGTERM and SIGUSR1, which schedulers send before they take a node away.

    If torchrun dies, its ranks get a SIGTERM too: they would outlive a killed torchrun, and write into the
    run folder together with the restarted job.
    """

    _NUMBERS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal, 0 if there was none; after `agreed`, the highest of any rank."""
        for number in self._NUMBERS:
            signal.signal(number, self._remember)
        # Asks the kernel for a SIGTERM when torchrun, the parent, dies.
        if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
            ctypes.CDLL(None).prctl(_SIGNAL_WHEN_PARENT_DIES, signal.SIGTERM)

    def _remember(self, number: int, _frame: types.FrameType | None) -> None:
        # Nothing else: the current step must be completed, as on every other rank.
        self.received = number

    def close(self) -> None:
        """Ignore the signals from now on.

        On exit, Python restores their default handlers: a late signal would kill a rank that has saved, and
        turn a run that stopped as asked into a failed one.
        """
        for number in self._NUMBERS:
            signal.signal(number, signal.SIG_IGN)

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; every rank gets the same answer in the same step."""
        flag = torch.tensor(self.received, device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        self.received = int(flag.item())
        return self.received > 0
