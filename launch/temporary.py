"""Temporary files of a node's ranks: in one folder, which goes when they end, or when the next ranks start.

The folder is locked (flock) by everything that uses it, so whether it is left over shows in any container
that sees it: a killed process holds no lock. Segments of shared memory have no such lock; there the processes
that map them are looked up.
"""

import contextlib
import fcntl
import getpass
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = ".k25_ranks_"
"""Of the folders' names, which nobody else gives: whatever is called so goes, with all that is in it."""
_FRESH = ".k25_new_"
"""Name of a folder until it is locked."""
FRESH_S = 3600.0
"""Age at which a folder that was never locked belongs to a process that was killed in that moment."""
_HOST_PID_NAMESPACE = "pid:[4026531836]"
"""The kernel's number of the first process namespace (PROC_PID_INIT_INO): from others, not all processes are
seen."""
_SEGMENT = re.compile(r"torch_(\d+)_[0-9a-f_]+|nccl-\w{6}")
"""Shared memory of torch (with the process that made it) and of NCCL."""
SEGMENT_S = 10.0
"""Age of a segment that nobody maps: it is mapped right after it was made."""


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder for everything temporary of this process and those that it starts (TMPDIR).

    What processes left that were killed is removed before and after.
    """
    base, before = Path(tempfile.gettempdir()), os.environ.get("TMPDIR")
    remove_leftovers(base)
    fresh = tempfile.mkdtemp(prefix=_FRESH)
    held = hold(Path(fresh))
    folder = base / (PREFIX + Path(fresh).name.removeprefix(_FRESH))
    os.rename(fresh, folder)
    # Compiled kernels are kept, where torch would have put them.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(base / f"torchinductor_{_user()}"))
    os.environ["TMPDIR"], tempfile.tempdir = str(folder), None
    try:
        yield folder
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before
        tempfile.tempdir = None
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)
        remove_leftovers(base)


def _user() -> str:
    try:
        return re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    except (KeyError, OSError):
        return str(os.getuid())


def hold(folder: Path) -> int:
    """Lock a folder, together with others who use it, until this process ends; returns the open file."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return descriptor


def hold_own() -> None:
    """Lock the folder that this process was given, so that it stays if torchrun dies first."""
    folder = Path(os.environ.get("TMPDIR") or "/")
    if folder.name.startswith(PREFIX):
        with contextlib.suppress(OSError):
            hold(folder)


def remove_leftovers(base: Path) -> None:
    """Remove folders of this user that no process uses any more, and segments of dead processes."""
    with contextlib.suppress(OSError):
        for path in base.iterdir():
            if path.name.startswith((PREFIX, _FRESH)):
                with contextlib.suppress(OSError):
                    _remove_if_unused(path)
    if _sees_all_processes():
        remove_segments(Path("/dev/shm"))


def _remove_if_unused(path: Path) -> None:
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return
    if path.name.startswith(_FRESH) and time.time() - found.st_mtime < FRESH_S:
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        # Fails while somebody uses it, and where there are no locks.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)


def remove_segments(folder: Path, proc: Path = Path("/proc")) -> None:
    """Remove segments of shared memory that ranks of this user left: nobody maps them or has them open."""
    with contextlib.suppress(OSError):
        candidates = [path for path in folder.iterdir() if _may_be_left(path, proc)]
        in_use = {os.path.basename(each) for each in names_in_use(proc)} if candidates else set()
        for path in candidates:
            # By name: in another container, the folder may have another path.
            if path.name not in in_use:
                with contextlib.suppress(OSError):
                    path.unlink()


def _may_be_left(path: Path, proc: Path) -> bool:
    match = _SEGMENT.fullmatch(path.name)
    if match is None:
        return False
    try:
        found = path.lstat()
    except OSError:
        return False
    is_own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
    is_dead = match[1] is None or not (proc / match[1]).exists()
    return is_own and is_dead and time.time() - found.st_mtime > SEGMENT_S


def names_in_use(proc: Path) -> set[str]:
    """Files that processes of this user map or have open; others may not use what only this user can read."""
    found: set[str] = set()
    for process in proc.iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            maps = (process / "maps").read_text(encoding="utf-8", errors="replace")
            found |= {fields[5] for line in maps.splitlines() if len(fields := line.split(maxsplit=5)) == 6}
        with contextlib.suppress(OSError):
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    found.add(os.readlink(link))
    return found


def _sees_all_processes() -> bool:
    try:
        return os.readlink("/proc/self/ns/pid") == _HOST_PID_NAMESPACE
    except OSError:
        return False
