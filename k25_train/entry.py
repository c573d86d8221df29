"""How every command ends: with its status, or with one named error on stderr and status 2."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable

from k25_train import farewell
from k25_train.errors import K25Error
from k25_train.escapes import named, place_of
from k25_train.joining.environment import speaks
from k25_train.terminal import ClosedPipeError, tolerant_output

REFUSED, FAULT, INTERRUPTED, CLOSED_PIPE = 2, 1, 130, 141
"""Exit statuses: of a named error, a fault of the code, Ctrl-C, and output that nobody reads (SIGPIPE's)."""
WAIT_FOR_FIRST_RANK_S = 20.0


def run_command(body: Callable[[], int | None], *, output_goes_on: bool = False) -> None:
    """Run a command and end the process unless it succeeds; see `exit_status`."""
    left: list[int] = []
    status = exit_status(lambda: _leaving(body, left), output_goes_on=output_goes_on)
    if not status and not left:
        farewell.is_done()
    if status and _has_process_group():
        # Threads of gloo and NCCL outlive an error, and C++ aborts a process that leaves while they run.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    # A rank that left with 0 in mid-run must not look done to a command around this one, such as launch.rank.
    if status or (left and farewell.error_file() is not None):
        sys.exit(status)


def _leaving(body: Callable[[], int | None], left: list[int]) -> int | None:
    """Run the body; a status is added to `left` if it left by sys.exit."""
    try:
        return body()
    except SystemExit:
        left.append(0)
        raise


def _has_process_group() -> bool:
    """Whether this process is a rank that has met the others; looks without importing torch."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def exit_status(body: Callable[[], int | None], *, output_goes_on: bool = False) -> int:
    """Run the body of a command; returns its exit status, after printing what ended it.

    Args:
        body: returns an exit status, None for 0.
        output_goes_on: whether it goes on where stdout cannot be written: it does something other than print.
    """
    try:
        with tolerant_output(goes_on=output_goes_on):
            return _status(body)
    except K25Error as error:
        # Of stdout itself, when the last of it was written.
        return report(error)


def _status(body: Callable[[], int | None]) -> int:
    try:
        return body() or 0
    except SystemExit as end:
        # argparse ends a process that has printed its help; what it printed has to arrive all the same.
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr, flush=True)
        return FAULT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    except BaseException as error:  # what a command lets out, and what libraries raise that is no Exception
        return report(error)


def report(error: BaseException) -> int:
    """Print an error, with the rank that has it; returns the exit status."""
    if isinstance(error, ClosedPipeError):
        return CLOSED_PIPE
    cause = named(error)
    if cause is None:
        traceback.print_exception(error)
        farewell.tell(f"{type(error).__name__}: {error}", error, is_fault=True)
        print(
            f"{_rank()}{type(error).__name__} in {place_of(error)} is a fault of k25-train, not of your "
            "settings: please report it with the lines above, the command and the run's config.yaml",
            file=sys.stderr,
            flush=True,
        )
        return FAULT
    text = f"{type(cause).__name__}: {cause}"
    farewell.tell(text, cause, is_fault=False)
    if cause.is_shared:
        return _report_shared(text)
    print(f"{_rank()}{text}", file=sys.stderr, flush=True)
    return REFUSED


def _report_shared(text: str) -> int:
    """Print an error that every rank has on rank 0.

    The others wait to be ended by torchrun: the first exit makes it end all, rank 0 perhaps before it spoke.
    Whoever is not ended is of a node whose settings differ, and so is the error: its first rank prints it.
    """
    if not speaks():
        time.sleep(WAIT_FOR_FIRST_RANK_S)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{_rank()}{text}", file=sys.stderr, flush=True)
        return REFUSED
    print(text, file=sys.stderr, flush=True)
    return REFUSED


def shared[Error: K25Error](error: Error) -> Error:
    """The error, marked as one that every rank has, so that the first one alone prints it."""
    error.is_shared = True
    return error


def _rank() -> str:
    return f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
