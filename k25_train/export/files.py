"""Which tensors of a released folder are in which file, at which byte; torch-free.

The release has a file for each decoder layer, one for embedding, last norm and head, one for the projector
and one for the tower: `model-00001-of-000064.safetensors` to `model-00064-of-000064.safetensors` for
moonshotai/Kimi-K2.5. They are as the safetensors library writes them, without metadata: entries sorted by
number format (float32, int32, bfloat16), then by name; a compact JSON header, padded with spaces to a
multiple of 8. Sizes that result equal those of all 64 released files, byte for byte (known of Kimi-K2.6,
which has the same tensors).
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from k25_train.export.listing import ReleasedTensor, StoredEntry, WeightFormat

_ORDER = {"F32": 0, "I32": 1, "BF16": 2}
_ALIGNMENT = 8
GB = 10**9


@dataclass(frozen=True)
class PlannedFile:
    """One safetensors file before it is written."""

    name: str
    """Name in the folder."""
    tensors: tuple[ReleasedTensor, ...]
    """What it holds, in the order of the release."""
    weights: WeightFormat
    """How routed experts are stored."""

    @cached_property
    def entries(self) -> tuple[StoredEntry, ...]:
        """What it stores, in the order of the file."""
        stored = [entry for tensor in self.tensors for entry in tensor.entries(self.weights)]
        return tuple(sorted(stored, key=lambda entry: (_ORDER[entry.dtype], entry.name)))

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Name of each entry -> its first byte in the file."""
        offsets, position = {}, len(self.header)
        for entry in self.entries:
            offsets[entry.name] = position
            position += entry.num_bytes
        return offsets

    @cached_property
    def header(self) -> bytes:
        """The beginning of the file: the length of the JSON text, and that."""
        described, position = {}, 0
        for entry in self.entries:
            stop = position + entry.num_bytes
            described[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [position, stop],
            }
            position = stop
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @property
    def num_data_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(entry.num_bytes for entry in self.entries)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + self.num_data_bytes


def plan_files(
    tensors: Iterable[ReleasedTensor], weights: WeightFormat, shard_gb: float | None = None
) -> list[PlannedFile]:
    """Files for these tensors, in their order.

    Args:
        tensors: of the whole release.
        weights: how routed experts are stored.
        shard_gb: most 10^9 bytes of tensors in a file, a single larger tensor excepted; None splits as the
            release does.
    """
    groups = _released_groups(tensors) if shard_gb is None else _filled(tensors, weights, shard_gb * GB)
    parts = list(groups)
    return [
        PlannedFile(f"model-{index:05d}-of-{len(parts):06d}.safetensors", tuple(part), weights)
        for index, part in enumerate(parts, 1)
    ]


def index_text(files: list[PlannedFile]) -> str:
    """`model.safetensors.index.json`: where each tensor is, and the bytes of all."""
    places = {entry.name: file.name for file in files for entry in file.entries}
    index = {
        "metadata": {"total_size": sum(file.num_data_bytes for file in files)},
        "weight_map": dict(sorted(places.items())),
    }
    return json.dumps(index, indent=2) + "\n"


def _released_groups(tensors: Iterable[ReleasedTensor]) -> Iterator[list[ReleasedTensor]]:
    for _, group in groupby(tensors, key=lambda tensor: tensor.group):
        yield list(group)


def _filled(
    tensors: Iterable[ReleasedTensor], weights: WeightFormat, most_bytes: float
) -> Iterator[list[ReleasedTensor]]:
    part: list[ReleasedTensor] = []
    filled = 0
    for tensor in tensors:
        num_bytes = sum(entry.num_bytes for entry in tensor.entries(weights))
        if part and filled + num_bytes > most_bytes:
            yield part
            part, filled = [], 0
        part.append(tensor)
        filled += num_bytes
    if part:
        yield part
