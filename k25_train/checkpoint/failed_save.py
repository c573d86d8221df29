"""What a save leaves that cannot be finished, and what is said of it."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

from k25_train.checkpoint import folders
from k25_train.checkpoint.storage.kinds import Place
from k25_train.checkpoint.storage.places import storage_of
from k25_train.errors import CheckpointError


def check_writable(folder: Place) -> None:
    """Raise `CheckpointError` if this rank cannot write there; an object store says so when it is used."""
    if isinstance(folder, Path) and not folder.is_dir():
        raise CheckpointError(f"{folder} is not there: checkpoints must be in a folder that all nodes share")
    if isinstance(folder, Path) and not os.access(folder, os.W_OK | os.X_OK):
        raise CheckpointError(f"{folder} cannot be written to")


def drop(folder: Place) -> None:
    """Delete what a save has left, as far as storage lets it."""
    with contextlib.suppress(OSError):
        storage_of(folder).remove(folder)


def not_written(root: Place, folder: Place, error: Exception) -> str:
    """That a checkpoint could not be written to `folder`, why, what is left of the run, and what to do."""
    try:
        newest = folders.newest_checkpoint(root)
        safe = f"{newest} is complete" if newest else "no earlier checkpoint exists"
    except OSError as unreadable:
        safe = f"which earlier checkpoints are there cannot be read ({unreadable})"
    free = ""
    if isinstance(root, Path):
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(root).free:,} bytes are free there, "
    full = (errno.ENOSPC, errno.EDQUOT)
    is_full = getattr(error, "errno", None) in full or any(f"[Errno {code}]" in str(error) for code in full)
    advice = "make room" if is_full else "see that every rank may write there"
    return (
        f"{folder}: could not be written ({error}); {free}{safe}; {advice}, or move the run folder and set "
        "run.dir, and start again"
    )
