"""Errors on their way from one process to another, which raises them as its own."""

import errno
import traceback

from k25_train.data.channel import can_be_sent
from k25_train.errors import K25Error


def portable(error: Exception) -> Exception:
    """The error as another process can raise it: the same if it is ours or the system's, with its number."""
    if isinstance(error, K25Error):
        error.code = error.code or _code_of(error)
    if not isinstance(error, K25Error | OSError | MemoryError) or not can_be_sent(error):
        text = "".join(traceback.format_exception(error))
        return RuntimeError(f"a fault in the process that reads data:\n{text}")
    return error


def _code_of(error: BaseException | None) -> str:
    """Name of the system's error number behind an error, whose causes do not come along; empty for none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return errno.errorcode.get(error.errno, "")
        error = error.__cause__
    return ""
