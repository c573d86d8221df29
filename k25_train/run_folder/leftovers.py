"""Files of the lock that processes left which were ended while they took it."""

import contextlib
from pathlib import Path

from k25_train.errors import K25Error
from k25_train.run_folder.lock import chain, claim_of, read
from k25_train.run_folder.process import Liveness, liveness
from k25_train.run_folder.record import LOCK, LockedError

STALE_S = 24 * 3600.0
"""Age of a record that nobody is about to use any more: taking a lock takes minutes at most."""


def remove_leftovers(run: Path) -> None:
    """Remove what processes left that were ended while they took the lock; for its holder.

    A record that nobody has linked to yet goes if its process is dead, if it is cut off, or if it is older
    than `STALE_S` by the file system's clock. A claim on a lock that was replaced goes: whoever made it would
    remove it. Faults are passed over: these files are small and harmless.
    """
    with contextlib.suppress(OSError, K25Error):
        now_s = (run / LOCK).stat().st_mtime
        counting = {link.path for link in chain(run)}
        counting |= {claim_of(run, link.holder) for link in chain(run)}
        for path in [*run.glob(f"{LOCK}.claim.*"), *run.glob(f"{LOCK}.new.*")]:
            with contextlib.suppress(OSError):
                is_claim = path.name.startswith(f"{LOCK}.claim.")
                if path not in counting if is_claim else _is_left_over(path, now_s):
                    path.unlink(missing_ok=True)


def _is_left_over(scratch: Path, now_s: float) -> bool:
    if now_s - scratch.stat().st_mtime > STALE_S:
        return True
    try:
        holder = read(scratch)
    except LockedError:
        # Cut off: it is written at once, and has been looked at twice.
        return True
    process = None if holder is None else holder.process
    return process is not None and liveness(process) is Liveness.dead
