"""Ctrl-C while a command starts."""

import signal


def end_quietly_on_interrupt() -> None:
    """Have Ctrl-C end the process at once, without a traceback, until training handles it.

    Nothing is lost so far. A background job of a shell goes on ignoring it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
