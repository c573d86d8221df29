"""A run's files from where they are: a folder, or a URL of any file system that fsspec knows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from k25_train.config.basics import is_url
from k25_train.errors import ConfigError, MachineError
from k25_train.run_folder.rows_file import METRICS_FILE


class File(Protocol):
    """A file that others write."""

    name: str
    """Path or URL."""

    def num_bytes(self) -> int | None:
        """Its size now; None if there is none. Raises `MachineError` if that cannot be told."""

    def read(self, start: int, stop: int) -> bytes:
        """Its bytes in this range, fewer where it ends before. Raises `MachineError`."""


class LocalFile:
    """A file of this machine, or of what is mounted."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path

    def num_bytes(self) -> int | None:
        """As `File`."""
        try:
            return self._path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _unreadable(self.name, error) from error

    def read(self, start: int, stop: int) -> bytes:
        """As `File`."""
        try:
            # A pipe of this name would wait for its other end.
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as file:
                file.seek(start)
                return file.read(stop - start)
        except OSError as error:
            raise _unreadable(self.name, error) from error


class RemoteFile:
    """A file behind a URL."""

    def __init__(self, fs: Any, path: str, name: str) -> None:
        """`fs` is fsspec's file system, `path` the file's in it."""
        self.name = name
        self._fs, self._path = fs, path

    def num_bytes(self) -> int | None:
        """As `File`."""
        try:
            # What was listed before is remembered.
            self._fs.invalidate_cache()
            return int(self._fs.info(self._path)["size"])
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever its libraries raise
            raise _unreadable(self.name, error) from error

    def read(self, start: int, stop: int) -> bytes:
        """As `File`."""
        try:
            data: bytes = self._fs.cat_file(self._path, start=start, end=stop)
        except Exception as error:  # whatever its libraries raise
            raise _unreadable(self.name, error) from error
        return data


def _unreadable(name: str, error: Exception) -> MachineError:
    return MachineError(f"{name}: cannot be read: {type(error).__name__}: {' '.join(str(error).split())}")


def file_of(run: str, name: str = METRICS_FILE) -> File:
    """A file of a run.

    Args:
        run: its folder, path or URL, or its file of rows: a local file, or any name that ends in `.jsonl`.
        name: of the file.

    Raises `ConfigError` for a URL that names nothing, or that no installed file system is for.
    """
    if is_url(run) and not run.partition("://")[2].strip("/"):
        raise ConfigError(f"{run}: names no run\n  -> write {run.rstrip('/')}//BUCKET/FOLDER")
    folder, own = run, name
    # A local folder may have any name.
    is_file = run.endswith(".jsonl") and (is_url(run) or not Path(run).is_dir())
    if is_file or (not is_url(run) and Path(run).is_file()):
        folder, _, last = run.rpartition("/")
        folder = folder or ("/" if run.startswith("/") else ".")
        own = last if name == METRICS_FILE else name
    if not is_url(run):
        return LocalFile(Path(folder) / own)
    import fsspec  # type: ignore[import-untyped]

    url = f"{folder.rstrip('/')}/{own}"
    try:
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"{url}: no file system for it is installed ({error}): pip install what it needs, or copy the "
            "run's files here"
        ) from error
    return RemoteFile(fs, path, url)
