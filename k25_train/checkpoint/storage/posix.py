"""Checkpoints in folders of a file system: local, or shared by all nodes (Lustre, GPFS, NFS).

What counts on them: `rename` of a folder is atomic, for other processes and after a crash, and what was
fsynced is there when a name says so (POSIX.1-2024, `rename`, `fsync`; NFSv4.1, RFC 8881, 18.26 RENAME and
18.3 COMMIT). Each node of a network file system may know a folder's old content for some seconds.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import override

from k25_train.checkpoint.storage.kinds import DAMAGED, LEFT_OVER, PARTIAL, UNSOUND, Storage

_SCRATCH = re.compile(r"\.latest\.[0-9a-f]{8}")
"""What `replace` writes before it is renamed."""
_NUM_THREADS = 16
"""Files that are looked at concurrently: there are thousands, each a request to the file system."""


class PosixStorage(Storage[Path]):
    """Folders that can be renamed."""

    has_rename = True

    @override
    def entries(self, root: Path) -> list[Path]:
        return list(root.iterdir()) if root.is_dir() else []

    @override
    def is_complete(self, folder: Path) -> bool:
        return folder.is_dir()

    @override
    def sizes(self, folder: Path, names: Collection[str]) -> Mapping[str, int]:
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            found = pool.map(lambda name: size_of(folder / name), names)
            return {name: size for name, size in zip(names, found, strict=True) if size is not None}

    @override
    def prepare(self, root: Path, step: int) -> Path:
        folder = root / f"step_{step}{PARTIAL}"
        self.remove(folder)
        folder.mkdir(parents=True)
        return folder

    @override
    def read(self, path: Path) -> str:
        return path.read_text(encoding="utf-8")

    @override
    def write(self, path: Path, text: str) -> None:
        # Created, never truncated: a file that another saver has open stays that one's.
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    @override
    def replace(self, path: Path, text: str) -> None:
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            self.write(scratch, text)
            os.replace(scratch, path)
        except OSError:
            scratch.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)

    @override
    def commit(self, written: Path, final: Path, name: str, text: str) -> None:
        self.write(written / name, text)
        sync_folder(written)
        # Over an empty folder this goes ahead; over one with files it raises.
        os.rename(written, final)
        sync_folder(final.parent)

    @override
    def set_unsound_aside(self, folder: Path) -> Path:
        target = folder.with_name(folder.name + UNSOUND)
        self.discard(target)
        os.rename(folder, target)
        sync_folder(folder.parent)
        return target

    @override
    def set_damaged_aside(self, folder: Path) -> Path:
        target, number = folder.with_name(folder.name + DAMAGED), 1
        while os.path.lexists(target):
            number += 1
            target = folder.with_name(f"{folder.name}{DAMAGED}.{number}")
        os.rename(folder, target)
        sync_folder(folder.parent)
        return target

    @override
    def discard(self, folder: Path, keep: str = "") -> None:
        self.remove(folder)

    @override
    def remove(self, path: Path) -> None:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        # Under a name of its own first: whoever renames it at this moment gets all of it, or nothing.
        doomed = path
        if not _is_doomed(path):
            doomed = path.with_name(f"{path.name.removesuffix(PARTIAL)}.{secrets.token_hex(4)}{PARTIAL}")
            try:
                os.rename(path, doomed)
            except FileNotFoundError:
                return
        shutil.rmtree(doomed)

    @override
    def left_overs(self, root: Path) -> list[Path]:
        patterns = (LEFT_OVER, _SCRATCH)
        return [
            each for each in self.entries(root) if any(pattern.fullmatch(each.name) for pattern in patterns)
        ]


def size_of(path: Path) -> int | None:
    """Bytes of a file, or None if there is none that can be seen."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk. File systems that cannot do that for folders are left alone."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _is_doomed(path: Path) -> bool:
    found = LEFT_OVER.fullmatch(path.name)
    return found is not None and found[2] is not None
