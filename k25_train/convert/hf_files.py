"""The safetensors files of a Hugging Face folder: what is where in them, from their headers alone.

Files come from elsewhere, so nothing in them is believed before it is checked: names of files lie in the
folder, and ranges of tensors within their file, without holes or overlaps. Data are read with `pread`, not
mapped: mapped pages would count as this process's memory.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from k25_train.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library 0.8 (`MAX_HEADER_SIZE`)."""
MAX_JSON_BYTES = 1_000_000_000
"""Of an index: the released one, of 208,550 tensors, has 20 MB."""
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
"""Name of a dtype in a header -> bytes of an element."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a file has it."""

    name: str
    """In the file."""
    path: Path
    """The file."""
    dtype: str
    """As the header names it: BF16, F32, …"""
    shape: tuple[int, ...]
    """Sizes of its axes."""
    offset: int
    """First byte in the file."""

    @property
    def numel(self) -> int:
        """Its elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return self.numel * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)} in {self.path.name}"


@dataclass(frozen=True, slots=True)
class HfFolder:
    """A folder of Hugging Face's form."""

    path: Path
    """The folder."""
    config: Mapping[str, Any]
    """Its config.json."""
    tensors: Mapping[str, StoredTensor]
    """By name, in the order of files and of places in them."""
    file_bytes: Mapping[str, int]
    """File -> size, of those with tensors."""


def open_folder(path: Path) -> HfFolder:
    """Read configuration, index and the headers of all files.

    Raises CheckpointError that names the file: none there, cut short, damaged, or not as the index says.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: is no folder; give one with config.json and .safetensors files")
    config = _read_json(path / CONFIG)
    index = _read_index(path)
    names = sorted(set(index.values())) if index is not None else [_only_file(path)]
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(names)} files in {INDEX} are not there: {_first(missing)}"
        )
    tensors: dict[str, StoredTensor] = {}
    sizes = {}
    for name in names:
        sizes[name] = (path / name).stat().st_size
        for tensor in read_header(path / name):
            if index is not None and index.get(tensor.name) != name:
                where = index.get(tensor.name)
                said = f"says that it is in {where}" if where else "does not know it"
                raise CheckpointError(f"{path / name}: has a tensor {tensor.name}, but {INDEX} {said}")
            tensors[tensor.name] = tensor
    lost = [name for name in index or {} if name not in tensors]
    if lost:
        where = index[lost[0]] if index else ""
        raise CheckpointError(
            f"{path}: tensors are not in the file that {INDEX} names, {where}: {_first(lost)}"
        )
    return HfFolder(path, config, tensors, sizes)


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, in the order of their data.

    Raises CheckpointError for a file that is not whole, or is no such file.
    """
    try:
        return _tensors(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: is no whole safetensors file: {error or type(error).__name__}; copy it again"
        ) from error


def read_bytes(path: Path, offset: int, num_bytes: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Bytes of a file, uint8 [num_bytes]. Raises CheckpointError if they cannot be read, or end early."""
    data = np.empty(num_bytes, dtype=np.uint8)
    view = memoryview(data)
    done = 0
    try:
        descriptor = _descriptor(path)
        while done < num_bytes:
            got = os.preadv(descriptor, [view[done:]], offset + done)
            if not got:
                raise CheckpointError(
                    f"{path}: ends at byte {offset + done:,}; it was longer when it was opened"
                )
            done += got
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read at byte {offset + done:,} ({error})") from error
    return data


class _Opened:
    """A file that is closed when it is not cached any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(maxsize=64)
def _opened(path: Path, _pid: int) -> _Opened:
    return _Opened(path)


def _descriptor(path: Path) -> int:
    return _opened(path, os.getpid()).descriptor


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: has {path.stat().st_size:,} bytes, which no such file has")
        # Python reads NaN and Infinity, which JSON has not.
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return values


def _no_constant(text: str) -> float:
    raise ValueError(f"it has a number {text}")


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor -> file; None without an index."""
    if not (folder / INDEX).exists():
        return None
    places = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{folder / INDEX}: has no weight_map")
    for name in places.values():
        # It may be a link, as in the cache of huggingface_hub; but its name is one of this folder.
        is_plain = isinstance(name, str) and name == os.path.basename(name) and not name.startswith(".")
        if not is_plain or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX}: names the file {name!r}: it must be a .safetensors file of this folder"
            )
    return places


def _only_file(folder: Path) -> str:
    if (folder / SINGLE).is_file():
        return SINGLE
    found = sorted(file.name for file in folder.iterdir() if file.name.endswith(".safetensors"))
    if len(found) == 1:
        return found[0]
    pickled = any(file.suffix in (".bin", ".pt", ".pth") for file in folder.iterdir())
    if found:
        what = f"has {len(found)} .safetensors files and no {INDEX}"
    elif pickled:
        what = "has weights as pickles alone, which can run code: save them with safetensors first"
    else:
        what = "has no .safetensors file"
    raise CheckpointError(f"{folder}: {what}")


def _tensors(path: Path) -> list[StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"its header would have {length:,} bytes of {size:,}")
        values = json.loads(file.read(length))
    values.pop("__metadata__", None)
    tensors, data_start = [], 8 + length
    ends = {}
    for name, value in values.items():
        first, last = value["data_offsets"]
        shape = tuple(value["shape"])
        if value["dtype"] not in ITEM_BYTES:
            raise ValueError(f"{name} has the dtype {value['dtype']!r}, which is not known")
        if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
            raise ValueError(f"{name} has shape {list(shape)} at {first} to {last}")
        tensor = StoredTensor(name, path, value["dtype"], shape, data_start + first)
        if last - first != tensor.num_bytes:
            raise ValueError(f"{tensor} has {last - first:,} bytes")
        tensors.append(tensor)
        ends[name] = data_start + last
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.num_bytes))
    end = data_start
    for tensor in tensors:
        if tensor.offset != end:
            raise ValueError(f"{tensor.name} starts at byte {tensor.offset:,}, where {end:,} would follow")
        end = ends[tensor.name]
    if end != size:
        raise ValueError(f"it has {size:,} bytes instead of the {end:,} of its header")
    return tensors


def _first(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
