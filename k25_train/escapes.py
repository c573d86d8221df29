"""What escapes a command and is no fault of its code, as a named error: file, value, rule and remedy.

Checks name what they find where they find it. This is the net below them, for whatever a file system, a
decoder or a missing package throws anywhere. What it does not know is a fault of the code and keeps its
traceback.
"""

import errno
import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import PurePath

from k25_train.errors import K25Error, MachineError

_PACKAGES = ("k25_train", "parallel", "launch")
_REMEDIES: Mapping[int, str] = {
    errno.ENOENT: "check the path, and that its file system is mounted on this machine",
    errno.ENOTDIR: "a part of the path is a file where a folder should be",
    errno.EISDIR: "it is a folder where a file should be",
    errno.EACCES: "change its permissions, or run as a user who may",
    errno.EPERM: "change its permissions, or run as a user who may",
    errno.EROFS: "the file system is read-only: choose another folder, or mount it writable",
    errno.ENOSPC: "the disk is full: make room, or choose a folder on another one",
    errno.EDQUOT: "the quota is used up: make room, or choose a folder on another file system",
    errno.EFBIG: "the file may not grow further: raise the limit (ulimit -f), or use another file system",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine: close some, or raise fs.file-max",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "its links lead in a circle: repair them",
    errno.EIO: "the disk or the network file system has a fault: see dmesg, then try again",
    errno.ESTALE: "the network file system changed underneath: try again, or mount it again",
    errno.ENOMEM: "memory is used up: stop other processes, or use smaller batches",
    errno.EEXIST: "something is there already: move it, or choose another path",
    errno.EADDRINUSE: "another process has the port: end it, or choose another port",
    errno.ECONNREFUSED: "nothing listens there: check the address, and that the first node was started",
}
FRAMES_WITH_PATHS = 6
_OUT_OF_MEMORY = "use smaller batches or sequences, more pipeline stages, or activation=k2"
_FILE_FORMATS = frozenset(("json", "yaml", "tarfile", "zipfile", "zlib", "gzip", "lzma", "struct", "pickle"))
"""Modules whose errors speak of a file's bytes."""


def named(error: BaseException) -> K25Error | None:
    """The error as one that a user can act on; None if it looks like a fault of the code."""
    if isinstance(error, K25Error):
        return error
    text = _described(error)
    if text is None:
        return None
    found = MachineError(f"{text}\n  (raised in {place_of(error)})")
    found.__cause__ = error
    return found


def _described(error: BaseException) -> str | None:
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, ImportError):
        return _of_import(error)
    if isinstance(error, UnicodeError):
        return f"a text cannot be read or written: {error}\n  -> correct the file or the name that it is in"
    if isinstance(error, json.JSONDecodeError):
        return (
            f"a file is not JSON: {error}: {error.doc[:60]!r}\n  -> write it again, or restore it from a copy"
        )
    if isinstance(error, MemoryError):
        return f"host memory is used up ({error or 'no details'})\n  -> {_OUT_OF_MEMORY}"
    # By name, so that nothing has to be imported to compare with.
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    if "torch.OutOfMemoryError" in kinds or "torch.cuda.OutOfMemoryError" in kinds:
        return f"the device's memory is used up: {_first_line(error)}\n  -> {_OUT_OF_MEMORY}"
    if _is_of_peer(error, kinds):
        return (
            f"a connection between ranks failed: {_first_line(error)}\n  -> if another rank reported an "
            "error, that is the cause; otherwise see whether its node is up, and start again"
        )
    if isinstance(error, RecursionError) and _raised_by(error) & _FILE_FORMATS:
        return "a file is nested too deeply to be read\n  -> write it again, or restore it from a copy"
    if {kind.split(".")[0].lstrip("_") for kind in kinds} & _FILE_FORMATS:
        return f"a file is damaged: {error}\n  -> restore it from a copy"
    return None


def _of_system(error: OSError) -> str:
    paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, str | bytes)]
    where = " -> ".join(paths) or _path_nearby(error) or "the system refused a request"
    number = error.errno or 0
    code = f" [{errno.errorcode[number]}]" if number in errno.errorcode else ""
    remedy = _REMEDIES.get(number, "see what is wrong there, then start again")
    return f"{where}: {error.strerror or error or type(error).__name__}{code}\n  -> {remedy}"


def _path_nearby(error: OSError) -> str | None:
    """The path that the innermost functions had in hand: a write that fails does not say to what."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-FRAMES_WITH_PATHS:]
    for frame in reversed(frames):
        found = [value for value in frame.f_locals.values() if isinstance(value, PurePath)]
        if found:
            return str(found[-1])
    return None


def _of_import(error: ImportError) -> str | None:
    package = (error.name or "").split(".")[0]
    if package in _PACKAGES:
        return None
    # A library that is there but lacks a name is a wrong version; fsspec gives its advice as the text alone.
    command = f"{os.path.basename(sys.executable)} -m pip install {package}" if package else "install it"
    return (
        f"a package is missing or has another version: {error}\n  -> {command}, or do without what needs it"
    )


def _is_of_peer(error: BaseException, kinds: set[str]) -> bool:
    if any(kind.startswith("torch.distributed.Dist") for kind in kinds):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        words in text for words in ("Connection closed by peer", "Connection reset by peer", "gloo/transport")
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


def _raised_by(error: BaseException) -> set[str]:
    """Top-level modules of the innermost frames."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-20:]
    return {str(frame.f_globals.get("__name__", "")).split(".")[0] for frame in frames}


def place_of(error: BaseException) -> str:
    """Module and line of this project that was running, for whoever has to look."""
    places = [
        f"{frame.f_globals['__name__']}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__", "")).split(".")[0] in _PACKAGES
    ]
    return places[-1] if places else "no code of this project"
