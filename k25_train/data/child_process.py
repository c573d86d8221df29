"""A child of this process that runs a function, and never outlives it. Linux only."""

import os
import signal
import traceback
from collections.abc import Callable
from ctypes import CDLL

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
"""Of Linux's prctl."""
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Signals that ask a rank to stop, which it does after its step: it needs the child until then."""


def fork(name: str, log: int, body: Callable[[], None]) -> int:
    """Run `body` in a child that ends with this process, by the kernel if this is killed.

    Call it from the main thread, while there is no other and no CUDA context.

    Args:
        name: of the child, where `top` shows names.
        log: descriptor to write to what ends the child, if it is an error.
        body: what the child does.

    Returns the child's number. Raises OSError if there can be no other process.
    """
    parent = os.getpid()
    # A signal in between would be handled by what the child has inherited.
    signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        pid = os.fork()
        if pid:
            return pid
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
    try:
        prctl = CDLL(None).prctl
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        prctl(_PR_SET_NAME, name.encode())
        # The parent may have ended before the kernel was asked.
        if os.getppid() == parent:
            body()
    except BaseException as error:  # whatever it is, the child ends by it
        os.write(log, "".join(traceback.format_exception(error, limit=-3)).encode())
        os._exit(1)
    os._exit(0)
