"""Why a checkpoint could not be written: megatron-core's writer tells the type of the error alone."""

import functools
from typing import Any


def tell_why_files_were_not_written() -> None:
    """Let `FileSystemWriterAsync` report what the operating system said.

    Upstream returns the error of a write, and asserts that it is a list: the assertion's text is all that
    ranks get. Where the disk filled up amid a tensor, the error is that of torch's archive, which could not
    be finished; the operating system's is its context.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    write = FileSystemWriterAsync.write_preloaded_data

    @functools.wraps(write)
    def write_or_raise(*args: Any, **kwargs: Any) -> Any:
        outcome = write(*args, **kwargs)
        if isinstance(outcome[1], Exception):
            raise _origin(outcome[1])
        return outcome

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write_or_raise)


def _origin(error: BaseException) -> BaseException:
    """The operating system's error among those that led to this one, or this one."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error
