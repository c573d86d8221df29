"""Checkpoints in an object store (`s3://BUCKET/PREFIX`), through fsspec.

A store has no rename. What counts: an object is there whole or not at all, and listings and reads see what
was written before (S3 user guide, "Amazon S3 data consistency model"). So the files of a save lie below
`step_N/<token>/`, a token that no other save has, and `step_N` counts while `step_N/manifest.json` is there,
one PUT, which is written last, is only created where none is (`If-None-Match`), and is deleted first. A rank
of a job that died long ago, whose upload ends now, changes nothing that a manifest names.
"""

import errno
import functools
import secrets
from collections.abc import Callable, Collection, Mapping
from pathlib import PurePosixPath
from typing import Any, override

from upath import UPath

from k25_train.checkpoint.storage.kinds import DAMAGED, MANIFEST, STEP, Storage


def names_place[**P, T](method: Callable[P, T]) -> Callable[P, T]:
    """Have whatever a client library throws leave as an OSError that names the place, the second argument."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except (FileExistsError, FileNotFoundError, UnicodeDecodeError):
            raise
        except Exception as error:
            # botocore and aiohttp have classes of their own for lost connections and missing keys.
            number = getattr(error, "errno", None) or errno.EREMOTEIO
            text = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise OSError(number, text, str(args[1])) from error

    return call


class ObjectStorage(Storage[UPath]):
    """Prefixes of an object store."""

    has_rename = False

    @override
    @names_place
    def entries(self, root: UPath) -> list[UPath]:
        try:
            found = _fs(root).ls(_key(root), detail=False)
        except FileNotFoundError:
            return []
        return [root / PurePosixPath(each).name for each in found if each.rstrip("/") != _key(root)]

    @override
    @names_place
    def is_complete(self, folder: UPath) -> bool:
        return bool(_fs(folder).exists(_key(folder / MANIFEST)))

    @override
    @names_place
    def sizes(self, folder: UPath, names: Collection[str]) -> Mapping[str, int]:
        # One request per thousand objects.
        start = len(_key(folder)) + 1
        found = _fs(folder).find(_key(folder), detail=True)
        by_name = {key[start:]: int(entry["size"]) for key, entry in found.items()}
        return {name: by_name[name] for name in names if name in by_name}

    @override
    @names_place
    def prepare(self, root: UPath, step: int) -> UPath:
        folder = root / f"step_{step}"
        if _is_left_over(folder):
            self.remove(folder)
        return folder / secrets.token_hex(4)

    @override
    @names_place
    def read(self, path: UPath) -> str:
        return bytes(_fs(path).cat_file(_key(path))).decode()

    @override
    @names_place
    def write(self, path: UPath, text: str) -> None:
        _fs(path).pipe_file(_key(path), text.encode())

    @override
    def replace(self, path: UPath, text: str) -> None:
        self.write(path, text)

    @override
    @names_place
    def commit(self, written: UPath, final: UPath, name: str, text: str) -> None:
        path, fs = final / name, _fs(final)
        if fs.exists(_key(path)):
            raise FileExistsError(errno.EEXIST, "another save has completed it", str(path))
        try:
            fs.pipe_file(_key(path), text.encode(), mode="create")
        except OSError as error:
            if error.errno != errno.ENOSYS:
                if "PreconditionFailed" in str(error) or "412" in str(error):
                    raise FileExistsError(errno.EEXIST, "another save has completed it", str(path)) from error
                raise
            # A store that knows no conditions. Two savers at the same instant: the later manifest counts,
            # and names its own files alone.
            fs.pipe_file(_key(path), text.encode())

    @override
    def set_unsound_aside(self, folder: UPath) -> UPath:
        return folder

    @override
    @names_place
    def set_damaged_aside(self, folder: UPath) -> UPath:
        path, number = folder / f"{MANIFEST}{DAMAGED}", 1
        while _fs(folder).exists(_key(path)):
            number += 1
            path = folder / f"{MANIFEST}{DAMAGED}.{number}"
        _fs(folder).copy(_key(folder / MANIFEST), _key(path))
        _fs(folder).rm_file(_key(folder / MANIFEST))
        return path

    @override
    @names_place
    def discard(self, folder: UPath, keep: str = "") -> None:
        _forget(folder / MANIFEST)
        self.remove(folder, keep)

    @override
    @names_place
    def remove(self, path: UPath, keep: str = "") -> None:
        fs, key = _fs(path), _key(path)
        found = [each for each in fs.find(key) if not keep or not each.startswith(f"{key}/{keep}/")]
        if found:
            fs.rm(found)

    @override
    @names_place
    def left_overs(self, root: UPath) -> list[UPath]:
        found = [each for each in self.entries(root) if STEP.fullmatch(each.name)]
        return [each for each in found if _is_left_over(each)]


def _is_left_over(folder: UPath) -> bool:
    """Whether something is there that no manifest speaks for, neither one that counts nor a damaged one's."""
    try:
        names = [PurePosixPath(each).name for each in _fs(folder).ls(_key(folder), detail=False)]
    except FileNotFoundError:
        return False
    return not any(name == MANIFEST or name.startswith(f"{MANIFEST}{DAMAGED}") for name in names)


def _forget(path: UPath) -> None:
    if _fs(path).exists(_key(path)):
        _fs(path).rm_file(_key(path))


def _fs(path: UPath) -> Any:
    """The client of a place's store, which answers every question with a request: others write there too."""
    return path.fs


def _key(path: UPath) -> str:
    return str(path.path).rstrip("/")
