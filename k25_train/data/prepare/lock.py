"""One writer per output: the lock of run folders (`run_folder/lock.py`), in the folder of work."""

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from k25_train.errors import DataError
from k25_train.run_folder.heartbeat import Heartbeat, is_renewed
from k25_train.run_folder.lock import Link, chain, link_once, replace, written
from k25_train.run_folder.process import Liveness, liveness, this_process
from k25_train.run_folder.record import LOCK, new_holder

_TURNS = 20


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[ExitStack]:
    """Hold a folder, which is made if need be. Raises DataError if a command that lives holds it.

    Yields a stack to put `heartbeat(folder)` on when all processes have been forked: it is a thread.
    """
    _take(folder)
    try:
        with ExitStack() as stack:
            yield stack
    finally:
        # With the work done, nothing but the lock is in it.
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()


@contextlib.contextmanager
def heartbeat(folder: Path) -> Iterator[None]:
    """Show other machines that the holder of the folder lives."""
    beat = Heartbeat(folder / LOCK)
    try:
        yield
    finally:
        beat.close()


def _take(folder: Path) -> None:
    mine = new_holder(None, this_process())
    for _ in range(_TURNS):
        folder.mkdir(parents=True, exist_ok=True)
        # Whoever held it before may remove the folder at this moment.
        with contextlib.suppress(FileNotFoundError), written(folder, mine) as scratch:
            links = chain(folder)
            if not links and link_once(scratch, folder / LOCK):
                return
            if links:
                _check_dead(folder, links[-1])
                if replace(folder, links, scratch):
                    return
    raise DataError(f"{folder}: its lock changes hands all the time. Start one command, not many.")


def _check_dead(folder: Path, link: Link) -> None:
    process = link.holder.process
    found = Liveness.dead if process is None else liveness(process)
    what = f"{folder.parent / folder.stem} is being prepared by {link.holder.describe()}"
    if found is Liveness.alive or (
        found is Liveness.unknown and is_renewed(link.path, what, lambda line: print(line, flush=True))
    ):
        raise DataError(f"{what}. Wait for its end, or choose another --out.")
