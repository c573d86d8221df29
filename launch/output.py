"""Output of processes: each rank's goes to a separate file, the supervisor's lines have time stamps.

A log that grows beyond a limit is continued in a new file of the same name, so `tail -F` goes on:

    rank_0.log             the newest lines
    rank_0.log.previous    those before
    rank_0.log.first       the beginning, which has the first error; it stays
"""

import contextlib
import fcntl
import os
import threading
import time
from pathlib import Path

LIMIT, LOGS = "K25_MAX_LOG_BYTES", "K25_NODE_LOGS"
"""Variables for processes that have no submission to read, torchrun and the ranks: the limit, and the logs of
the node, its own first, then those of its ranks."""
FIRST, PREVIOUS = ".first", ".previous"
CHECK_S = 1.0
CHECK_OTHERS_S = 10.0
"""Seconds between looks at logs of other processes."""
STREAMS = (1, 2)
FAST = 2
"""Multiple of the limit beyond which a log is shortened when it is continued: it grew so much in between."""
STUCK = 4
"""Multiple of the limit at which a log is cut from outside: its process holds Python's lock, or has ended and
left the file to another."""


def redirect(log: Path) -> None:
    """Append stdout and stderr to `log` from now on, including those of native code and after an exec."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in STREAMS:
        os.dup2(file, stream)
    os.close(file)


def log(text: str) -> None:
    """Print one line of supervisor.log."""
    print(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}", flush=True)


def limit_of_environment() -> int:
    """The limit that this process was given in bytes; 0 for none."""
    text = os.environ.get(LIMIT, "")
    return int(text) if text.isdecimal() else 0


def keep_limited(log: Path, limit_bytes: int) -> None:
    """Continue this process's log in a new file whenever it has grown beyond the limit, 0 for never; from a
    thread, as long as the process lives."""
    if limit_bytes > 0:
        arguments = (log, limit_bytes)
        threading.Thread(target=_watch, args=arguments, name="log limit", daemon=True).start()


def _watch(log: Path, limit_bytes: int) -> None:
    while True:
        # A file system that is away for a moment.
        with contextlib.suppress(OSError):
            continue_if_long(log, limit_bytes)
        time.sleep(CHECK_S)


def continue_if_long(log: Path, limit_bytes: int) -> None:
    """Have this process's stdout and stderr continue in a new file if `log`, to which they lead, is long."""
    # What other processes do is asked of the file system only where a log is long.
    long = [stream for stream in STREAMS if os.fstat(stream).st_size > limit_bytes]
    own = [stream for stream in long if any(_leads_to(stream, path) for path in family(log))]
    if not own:
        return
    renamed = _rename(log, own[0])
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in own:
        os.dup2(file, stream)
    os.close(file)
    if renamed is not None:
        cut(renamed, limit_bytes, FAST)


def _rename(log: Path, stream: int) -> Path | None:
    """Give `log` the name of what came before; its new path. None if the stream no longer leads to it, since
    another process that shares the file was faster.

    Raises `BlockingIOError` if it is just doing so: two would both take the log for the first one.
    """
    with contextlib.suppress(FileNotFoundError), log.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            # A file system without locks.
            pass
        if _leads_to(stream, log) and os.path.samestat(os.fstat(file.fileno()), os.fstat(stream)):
            _, previous, first = family(log)
            renamed = previous if first.exists() else first
            os.rename(log, renamed)
            return renamed
    return None


def family(log: Path) -> list[Path]:
    """A log with what came before it, newest first; they need not be there."""
    return [log, log.with_name(log.name + PREVIOUS), log.with_name(log.name + FIRST)]


def _leads_to(stream: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream), path.stat())
    except OSError:
        return False


def keep_others_limited() -> None:
    """Cut logs of this node's ranks that grow far beyond the limit; from a thread, for torchrun."""
    logs, limit_bytes = os.environ.get(LOGS, "").split(os.pathsep), limit_of_environment()
    if limit_bytes > 0 and logs[0]:
        keep_limited(Path(logs[0]), limit_bytes)
        of_ranks = [path for log in logs[1:] for path in family(Path(log))]
        arguments = (of_ranks, limit_bytes)
        threading.Thread(target=_watch_others, args=arguments, name="rank logs", daemon=True).start()


def _watch_others(logs: list[Path], limit_bytes: int) -> None:
    while True:
        time.sleep(CHECK_OTHERS_S)
        for log in logs:
            with contextlib.suppress(OSError):
                cut(log, limit_bytes)


def cut(log: Path, limit_bytes: int, multiple: int = STUCK) -> None:
    """Shorten a file of more than a multiple of the limit that others may append to: its beginning and end
    stay, each up to the limit.

    For logs of programs that cannot continue in a new file; lines that come in this moment may be lost.
    """
    with log.open("r+b") as file:
        size_bytes = file.seek(0, os.SEEK_END)
        if size_bytes <= multiple * limit_bytes:
            return
        file.seek(size_bytes - limit_bytes)
        end = file.read()
        os.ftruncate(file.fileno(), limit_bytes)
    with log.open("ab") as file:
        lost = size_bytes - 2 * limit_bytes
        file.write(b"\n[... %d bytes were left out here, the log was too long ...]\n" % lost + end)
