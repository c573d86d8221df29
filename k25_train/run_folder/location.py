"""The run folder as a node sees it: made, looked into, written to, each failure with its remedy.

A file that another machine has just written may be hidden by caches for a few seconds. What is looked for is
opened, and its folder before it, since NFS asks the server then, and answers `stat` by itself.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from k25_train.errors import ConfigError
from k25_train.run_folder.lock import current
from k25_train.run_folder.record import LockedError

LOOK_S = 10.0
"""How long a file that should be there is looked for."""
RETRY_S = 0.25
TOKENS = ".startup."
"""Beginning of the name of the folder in which nodes leave their tokens; it goes when all have been seen."""
REMEDIES = {
    errno.ENOTDIR: "a file, or a broken link, is in its place: choose another run.dir",
    errno.EEXIST: "a file, or a broken link, is in its place: choose another run.dir",
    errno.EACCES: "this user may not write there: change its permissions, or choose another run.dir",
    errno.EPERM: "this user may not write there: change its permissions, or choose another run.dir",
    errno.EROFS: "the file system is read-only: mount it writable, or choose another run.dir",
    errno.ENOSPC: "the disk is full: make room there, or choose a run.dir on another",
    errno.EDQUOT: "the quota is used up: make room there, or choose another run.dir",
    errno.ENAMETOOLONG: "its name is too long: choose a shorter run.dir",
    errno.ELOOP: "a link leads back to itself: choose another run.dir",
}
"""Error of the file system -> what it means here, and what to do."""


def make(run: Path) -> None:
    """Make sure that the folder exists. Raises `ConfigError` if it cannot."""
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable(run, error) from error


def unusable(run: Path, error: OSError) -> ConfigError:
    """The error of a run folder that cannot be made or written."""
    remedy = REMEDIES.get(error.errno or 0, "choose another run.dir")
    return ConfigError(f"run.dir={run} cannot be used ({error.strerror or error}): {remedy}")


def sees_lock(run: Path, holder_id: str) -> str | None:
    """None if this node sees the lock that rank 0 has just taken; else why not."""

    def look() -> str | None:
        try:
            holder = current(run)
        except LockedError as error:
            return str(error)
        if holder is None:
            return "does not see the lock that rank 0 has written there"
        return None if holder.id == holder_id else f"sees the lock of {holder.describe()} there"

    return _retry(look, run, "does not see it", LOOK_S)


def shared_folders(run: Path) -> list[str]:
    """The folders that all nodes have to share: "." and what is in it already, each of which may be a mount
    or a link of its own. What is made later is where its parent is."""
    inner = [entry.name for entry in os.scandir(run) if entry.is_dir() and not entry.name.startswith(".")]
    return [".", *sorted(inner)]


def make_tokens(folder: Path, holder_id: str, rank: int) -> None:
    """Make the folder of the tokens, with one of this rank in it. Raises OSError."""
    tokens(folder, holder_id).mkdir()
    (tokens(folder, holder_id) / str(rank)).write_text(holder_id, encoding="utf-8")


def try_to_rename(folder: Path) -> None:
    """Give a folder with a file another name in `folder`, as a checkpoint gets its own. Raises OSError if the
    file system cannot do that, or loses the file."""
    before, after = folder / "step_0.partial", folder / "step_0"
    before.mkdir()
    (before / "file").touch()
    os.rename(before, after)
    if not (after / "file").exists():
        raise OSError(errno.EIO, "a folder was renamed, and its file is gone", str(after))
    shutil.rmtree(after)


def exchange_tokens(run: Path, folders: Sequence[str], holder_id: str, rank: int) -> str | None:
    """Look for the token of rank 0 in each of the folders, and leave one there for it to find; what is wrong,
    or None."""
    for name in folders:
        trouble = _sees_token(run / name, holder_id, 0, LOOK_S, "does not see what rank 0 has written there")
        trouble = leave_token(run / name, holder_id, rank) if trouble is None else trouble
        if trouble is not None:
            return _in_folder(name, trouble)
    return None


def leave_token(folder: Path, holder_id: str, rank: int) -> str | None:
    """Write a file that rank 0 looks for. Returns why it cannot, or None."""
    try:
        (tokens(folder, holder_id) / str(rank)).write_text(holder_id, encoding="utf-8")
    except OSError as error:
        return f"cannot write there ({error.strerror or error})"
    return None


def sees_tokens(run: Path, folders: Sequence[str], holder_id: str, rank: int, limit_s: float) -> str | None:
    """None if the files of `rank` are seen from here within `limit_s`; else why not."""
    for name in folders:
        trouble = _sees_token(run / name, holder_id, rank, limit_s, "writes there what rank 0 does not see")
        if trouble is not None:
            return _in_folder(name, trouble)
    return None


def _sees_token(folder: Path, holder_id: str, rank: int, limit_s: float, missing: str) -> str | None:
    path = tokens(folder, holder_id) / str(rank)

    def look() -> str | None:
        is_right = path.read_text(encoding="utf-8") == holder_id
        return None if is_right else "reads there something else than was written"

    return _retry(look, path.parent, missing, limit_s)


def _in_folder(name: str, trouble: str) -> str:
    return trouble if name == "." else f"{name}/: {trouble}"


def tokens(folder: Path, holder_id: str) -> Path:
    """The folder of the tokens."""
    return folder / f"{TOKENS}{holder_id}"


def remove_tokens(run: Path, holder_id: str = "*") -> None:
    """Remove what nodes left, in this start or an earlier one; for rank 0, which holds the folder."""
    for pattern in (f"{TOKENS}{holder_id}", f"*/{TOKENS}{holder_id}"):
        for folder in run.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def not_shared(run: Path, troubles: Mapping[str, str]) -> str:
    """The error of a folder that is not one on all nodes.

    Args:
        run: the run folder.
        troubles: what is wrong -> the nodes, in words.
    """
    lines = [f"  {place}: {trouble}" for trouble, place in troubles.items()]
    remedy = (
        "  -> choose a folder on a file system that every node has mounted, and may write to, without mounts "
        "or links in it that lead elsewhere on some nodes: each writes its part of a checkpoint there"
    )
    return "\n".join([f"run.dir={run} is not one folder that all nodes share:", *lines, remedy])


def _retry(look: Callable[[], str | None], folder: Path, missing: str, limit_s: float) -> str | None:
    """The answer of `look` once it is None, or the last one after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
            trouble = look()
        except FileNotFoundError:
            trouble = missing
        except OSError as error:
            trouble = f"cannot read it ({error.strerror or error})"
        if trouble is None or time.monotonic() >= deadline:
            return trouble
        time.sleep(RETRY_S)
