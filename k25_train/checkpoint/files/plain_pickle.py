"""What is read of formats 1 and 2 runs no code: unpickling is limited to plain data.

torch 2.13 reads `.metadata` with `pickle.load`, and what is no tensor with `torch.load(weights_only=False)`.
A pickle may name any function: a foreign folder would be a program.
"""

import pickle
import re
from io import IOBase
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

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


def load_plain_data(file: IO[bytes], name: str) -> Any:
    """What `torch.save` wrote: tensors, numbers, texts. Raises UnpicklingError naming it otherwise."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own text advises to run the code.
        asked_for = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"asks for {asked_for[1]}, which no checkpoint has" if asked_for else "is damaged"
        raise pickle.UnpicklingError(f"{name} {reason}") from error
