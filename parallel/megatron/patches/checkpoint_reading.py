"""Reading a checkpoint runs no code of it: what torch and megatron-core unpickle is limited to plain data.

torch's `FileSystemReader` reads `.metadata` with `pickle.load`, its `DefaultLoadPlanner` what is no tensor
with `torch.load(weights_only=False)`, and megatron-core its older `common.pt` with torch's default, which a
variable of the environment changes. A pickle may name any function: a foreign folder would be a program.
Tensors are read with `weights_only=True` upstream.
"""

import functools
import pickle
import re
from collections.abc import Callable
from io import IOBase
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

_PLAIN = {
    "torch": {"Size"},
    # Looks a layout up by its name.
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}
"""Module -> data classes, enumerations and look-ups that `.metadata` consists of."""


class MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but the parts of `.metadata`."""

    def find_class(self, module: str, name: str) -> Any:
        """A class or dtype by name. Raises UnpicklingError for one that no checkpoint of ours has."""
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if name not in _PLAIN.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint has")
        return super().find_class(module, name)


def load_metadata(file: IO[bytes] | IOBase) -> Metadata:
    """What `.metadata` holds. Raises UnpicklingError if that is something else, or garbage."""
    try:
        metadata = MetadataUnpickler(file).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:
        # Garbage can make it raise anything: AttributeError, IndexError, UnicodeDecodeError, MemoryError.
        raise pickle.UnpicklingError(f"it is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
    return metadata


def bytes_by_file(path: Path) -> dict[str, int]:
    """File that a `.metadata` names -> bytes that it must have at least.

    Raises UnpicklingError as `load_metadata` does, OSError if it cannot be read.
    """
    with path.open("rb") as file:
        metadata = load_metadata(file)
    ends: dict[str, int] = {}
    try:
        for stored in metadata.storage_data.values():
            end = stored.offset + stored.length
            ends[stored.relative_path] = max(end, ends.get(stored.relative_path, 0))
    except (AttributeError, TypeError) as error:
        raise pickle.UnpicklingError(f"it is damaged ({error})") from error
    return ends


def unpickle_plain_data_only() -> None:
    """Let every path of `dist_checkpointing.load` refuse what is not plain data."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common

    FileSystemReader.read_metadata = _read_metadata  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]
    load_common = _with_weights_only(common.load_common)
    common.load_common = load_common
    serialization.load_common = load_common


def _read_metadata(self: FileSystemReader) -> Metadata:
    # Without the parameters of upstream's, torch does not try a file per rank where this one fails.
    with self.fs.create_stream(self._get_metadata_path(), "rb") as file:
        metadata = load_metadata(file)
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
    return metadata


def _load_bytes(self: DefaultLoadPlanner, read_item: Any, value: IO[bytes]) -> None:
    name = read_item.dest_index.fqn
    stored = self.metadata.storage_data[read_item.storage_index]  # type: ignore[union-attr]
    loaded = load_plain_data(value, f"{stored.relative_path}: {name}")
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded


def _with_weights_only(load_common: Callable[[str], Any]) -> Callable[[str], Any]:
    @functools.wraps(load_common)
    def load(checkpoint_dir: str) -> Any:
        with (Path(checkpoint_dir) / "common.pt").open("rb") as file:
            return load_plain_data(file, "common.pt")

    return load


def load_plain_data(file: IO[bytes], name: str) -> Any:
    """What `torch.save` wrote: tensors, numbers, texts. Raises UnpicklingError naming it otherwise."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own text advises to run the code.
        asked_for = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"asks for {asked_for[1]}, which no checkpoint has" if asked_for else "is damaged"
        raise pickle.UnpicklingError(f"{name} {reason}") from error
