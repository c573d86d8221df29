"""One safetensors file of an exported folder, written as its tensors come.

A file gets its name when all of it is on disk, so that one with a name is complete: who was killed goes on
behind it. Tensors go straight to their place in the file, and what is held is one of them.
"""

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from k25_train.errors import CheckpointError
from k25_train.export.files import PlannedFile
from k25_train.export.stream import TORCH_DTYPES, NamedTensor

_MOST_AT_ONCE = 1 << 30
"""Bytes of one write: Linux writes 2 GiB less a page at most."""


@contextmanager
def placed(path: Path) -> Iterator[Path]:
    """Where to write a small file that gets its name when it is whole and on disk. Several processes of
    several nodes may write the same; names of their own tell host and process, which may have equal numbers.
    """
    own = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        yield own
        with own.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(own, path)
    finally:
        own.unlink(missing_ok=True)


def is_written(file: PlannedFile, folder: Path) -> bool:
    """Whether the file is there, complete."""
    try:
        return (folder / file.name).stat().st_size == file.num_bytes
    except FileNotFoundError:
        return False


def write_file(file: PlannedFile, folder: Path, stream: Iterable[NamedTensor]) -> None:
    """Write a file, its tensors in any order.

    Raises `CheckpointError` if the stream lacks a tensor of the file or has another; OSError.
    """
    partial = folder / f".{file.name}.{socket.gethostname()}.{os.getpid()}"
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        _fill(descriptor, file, stream)
        os.fsync(descriptor)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    os.replace(partial, folder / file.name)


def drop_leftovers(folder: Path, *, of_all_nodes: bool = False) -> None:
    """Remove what processes of this node left that were killed; of all nodes, once nobody writes any more."""
    for path in folder.glob(".model-*"):
        _, _, host_and_pid = path.name.partition(".safetensors.")
        host, _, pid = host_and_pid.rpartition(".")
        is_dead = host == socket.gethostname() and pid.isdecimal() and not Path(f"/proc/{pid}").exists()
        if is_dead or of_all_nodes:
            path.unlink(missing_ok=True)


def _fill(descriptor: int, file: PlannedFile, stream: Iterable[NamedTensor]) -> None:
    missing = {entry.name: entry for entry in file.entries}
    _write_at(descriptor, memoryview(file.header), 0)
    for name, tensor in stream:
        entry = missing.pop(name, None)
        if entry is None or entry.shape != tuple(tensor.shape):
            raise CheckpointError(f"{file.name}: has no {name} {list(tensor.shape)}, or has it already")
        if tensor.dtype != TORCH_DTYPES[entry.dtype]:
            raise CheckpointError(f"{name}: {tensor.dtype} where the release has {entry.dtype}")
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        _write_at(descriptor, memoryview(raw), file.offsets[name])
    if missing:
        names = ", ".join(list(missing)[:3])
        raise CheckpointError(f"{file.name}: nothing gave {names} ({len(missing)} tensors are missing)")


def _write_at(descriptor: int, data: memoryview, position: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + _MOST_AT_ONCE], position + done)
