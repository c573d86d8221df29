"""Indexes at URLs, copied to a node's disk once: all ranks of a node map the same file."""

import fcntl
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from k25_train.data.folder import locate
from k25_train.data.formats.index_prefix import MissingIndexError
from k25_train.data.storage.attempts import describe
from k25_train.errors import DataError


def local_index(url: str, cache_dir: str | None) -> Path:
    """A copy of the index at `url` as it is now, in `data.cache_dir`, or else in the system's folder for
    temporary files. The first process of a node copies, others wait.

    Raises MissingIndexError if there is none, and DataError if it cannot be copied.
    """
    fs, place = locate(url, "data.sources.NAME.index")
    try:
        found = fs.info(place)
    except FileNotFoundError as error:
        raise MissingIndexError(f"{url}: no such index.") from error
    except Exception as error:  # file systems of fsspec raise what their libraries do
        raise DataError(f"{url}: this index cannot be read ({describe(error)}).") from error
    version = [url, found["size"], *(str(found.get(key, "")) for key in ("ETag", "mtime", "LastModified"))]
    name = hashlib.sha256("\n".join(map(str, version)).encode()).hexdigest()[:32]
    folder = Path(cache_dir or tempfile.gettempdir()) / f"k25-indexes-{os.getuid()}"
    path = folder / f"{name}.k25index"
    try:
        _copy(fs, place, int(found["size"]), path)
    except Exception as error:  # as above
        raise DataError(
            f"{url}: this index cannot be copied to {folder} ({describe(error)}). Make room there, or set "
            "data.cache_dir to a folder on a local disk."
        ) from error
    return path


def _copy(fs: Any, place: str, num_bytes: int, path: Path) -> None:
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    with open(path.with_suffix(".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        partial = path.with_suffix(".partial")
        fs.get_file(place, str(partial))
        if partial.stat().st_size != num_bytes:
            raise OSError(f"{partial.stat().st_size} of {num_bytes} bytes came")
        partial.replace(path)
