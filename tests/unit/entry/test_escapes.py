"""What escapes a command: which of it is named, and how."""

import errno
import json
import lzma
import os
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from k25_train.errors import DataError, MachineError
from k25_train.escapes import named


def caught(cause: Callable[[], object]) -> Exception:
    """What calling this raises."""
    try:
        cause()
    except Exception as error:
        return error
    pytest.fail("nothing was raised")


def raising(error: BaseException) -> Callable[[], None]:
    def cause() -> None:
        raise error

    return cause


NAMED: dict[str, tuple[Callable[[], object], str]] = {
    "no file": (
        lambda: Path("/no/such").read_bytes(),
        r"^/no/such: No such file .*\[ENOENT\]\n  -> check the path",
    ),
    "full disk": (
        raising(OSError(errno.ENOSPC, "No space left", "/d/f")),
        r"^/d/f: .*\[ENOSPC\]\n  -> .*make room",
    ),
    "rename": (lambda: os.rename("/no/a", "/no/b"), r"^/no/a -> /no/b: No such file"),
    "no path": (raising(OSError(errno.EMFILE, "Too many open files")), r"^the system refused .*ulimit -n"),
    "unknown number": (raising(OSError(9999, "odd", "/x")), r"^/x: odd\n  -> see what is wrong"),
    "text of a library": (raising(OSError("s3: no credentials")), "s3: no credentials"),
    "time-out": (raising(TimeoutError("timed out")), "timed out"),
    "bytes": (
        lambda: b"\xff".decode(),
        "a text cannot be read or written: 'utf-8' codec can't decode byte 0xff",
    ),
    "surrogate": (lambda: "\ud83d".encode(), "surrogates not allowed"),
    "JSON": (lambda: json.loads("{"), r"a file is not JSON: .*'{'"),
    "package": (lambda: __import__("no_such_package.inner"), "-m pip install no_such_package"),
    "fsspec's advice": (raising(ImportError("Install s3fs to access S3")), "Install s3fs to access S3"),
    "memory": (raising(MemoryError("9 GiB")), r"host memory is used up \(9 GiB\)"),
    "device memory": (
        raising(torch.OutOfMemoryError("CUDA out of memory")),
        "the device's memory is used up",
    ),
    "peer": (
        raising(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")),
        "between ranks",
    ),
    "store": (raising(torch.distributed.DistNetworkError("lost")), "a connection between ranks failed: lost"),
    "archive": (
        raising(tarfile.ReadError("unexpected end of data")),
        "a file is damaged: unexpected end of data",
    ),
    "compressed": (lambda: zlib.decompress(b"x"), "a file is damaged"),
    "packed harder": (lambda: lzma.decompress(b"x"), "a file is damaged"),
    "pickled": (lambda: pickle.loads(b"?"), "a file is damaged"),
    "nested JSON": (lambda: json.loads("[" * 100_000), "a file is nested too deeply"),
}
BUGS: dict[str, Callable[[], object]] = {
    "key": lambda: {}["a"],
    "index": lambda: [][0],
    "attribute": lambda: None.x,  # type: ignore[attr-defined]
    "type": lambda: 1 + "a",  # type: ignore[operator]
    "value": lambda: int("a"),
    "division": lambda: 1 / 0,
    "assertion": raising(AssertionError("no")),
    "our own module": lambda: __import__("k25_train.no_such_module"),
    "shapes": lambda: torch.zeros(2) + torch.zeros(3),
}


@pytest.mark.parametrize("name", NAMED)
def test_the_machines_faults_are_named(name: str) -> None:
    cause, words = NAMED[name]
    error = caught(cause)
    found = named(error)
    assert isinstance(found, MachineError) and found.__cause__ is error
    assert re.search(words, str(found), re.DOTALL), found
    assert "\n  -> " in str(found) and "(raised in " in str(found)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_write_that_fails_names_its_file(tmp_path: Path) -> None:
    link = tmp_path / "full"
    link.symlink_to("/dev/full")
    error = caught(lambda: link.write_text("x", encoding="utf-8"))
    assert isinstance(error, OSError) and error.filename is None
    assert str(named(error)).startswith(f"{link}: No space left on device [ENOSPC]\n  -> the disk is full")


@pytest.mark.parametrize("name", BUGS)
def test_faults_of_the_code_are_not(name: str) -> None:
    assert named(caught(BUGS[name])) is None


def test_recursion_of_our_own_is_a_fault_of_the_code() -> None:
    def again() -> None:
        again()

    assert named(caught(again)) is None


def test_our_errors_stay_as_they_are() -> None:
    error = DataError("a.tar: cut short")
    assert named(error) is error
