"""Checkpoints of format 3 made of any tensors, cut anyhow, for tests."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from upath import UPath

from k25_train.checkpoint.files.parts import DTYPE_NAMES, Part
from k25_train.checkpoint.files.writer import write_parts
from k25_train.checkpoint.manifest import MANIFEST, FileEntry, Kind, Manifest


def any_tensor(dtype: torch.dtype, *shape: int) -> Tensor:
    """Of random bytes, so that every pattern of bits may occur, NaN among them; bool of 0 and 1."""
    count = math.prod(shape) * dtype.itemsize
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


def one_of_each_dtype() -> dict[str, Tensor]:
    """A tensor per dtype, of odd sizes; a scalar, an empty one, and one of several blocks."""
    tensors = {f"of.{name}": any_tensor(dtype, 3, 37) for dtype, name in DTYPE_NAMES.items()}
    return tensors | {
        "scalar": any_tensor(torch.float32),
        "empty": any_tensor(torch.bfloat16, 0, 4),
        "large": any_tensor(torch.bfloat16, 3, 5, 70_001),
    }


def pieces_of(tensors: Mapping[str, Tensor], num_pieces: int) -> list[tuple[Part, Tensor]]:
    """Every tensor cut into about `num_pieces` uneven ranges."""
    pairs = []
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        shape, count = tuple(tensor.shape), flat.numel()
        points = sorted(
            {0, count, *(count * (3 * each + 1) // (3 * num_pieces) for each in range(num_pieces))}
        )
        for start, stop in list(pairwise(points)) or [(0, 0)]:
            pairs.append((Part(name, tensor.dtype, shape, start, stop), flat[start:stop]))
    return pairs


def write_checkpoint(
    folder: Path | UPath,
    files: Mapping[str, Sequence[tuple[Part, Tensor]]],
    **values: object,
) -> dict[str, FileEntry]:
    """A folder with these files of parts and a manifest that lists them."""
    entries = {name: write_parts(folder / name, pairs) for name, pairs in files.items()}
    write_manifest(folder, entries, **values)
    return entries


def write_manifest(folder: Path | UPath, entries: Mapping[str, FileEntry], **values: object) -> None:
    """A manifest that lists these files."""
    manifest = Manifest(
        **{"step": 5, "files": entries, "facts": {}, "kind": Kind.RUN, "num_updates": 5} | values
    )
    (folder / MANIFEST).write_text(manifest.to_text())
