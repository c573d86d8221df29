"""Every tensor of a released folder and where its elements are in ours, from the configuration; torch-free.

Each of the release's tensors is one contiguous range of one of the flattened tensors that training holds:
experts are stacked along the first axis, gate and up projection are joined by rows, and a flattened
convolution has the same elements. So a stream of released tensors is a sequence of ranges to read.

The order is that of the release's files: decoder layers, then embedding, last norm and head, the projector
and the tower. Within a layer it is that of the forward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import NamedTuple

from k25_train.config.model import INT4_GROUP, ModelConfig
from k25_train.config.vision import VisionPart
from k25_train.parameters import table
from k25_train.parameters.entry import ParameterEntry, Site, fill

TEXT_PREFIX = "language_model."
"""What the language model's names begin with where there is a vision part; text models have them without."""
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "int32": "I32"}
DTYPE_BYTES = {"F32": 4, "BF16": 2, "I32": 4}
INT4_PER_WORD = 8


class WeightFormat(Enum):
    """How weights are stored."""

    bf16 = "bf16"
    """All as in the release, routed experts unpacked."""
    int4 = "int4"
    """The release: routed experts packed."""
    float32 = "float32"
    """Not in any release: all in float32, so that nothing of a float32 run is rounded."""


class Contents(Enum):
    """Which parts of the model a released folder has."""

    all = "all"
    """Language model, projector and tower, as Kimi-K2.5."""
    text = "text"
    """The language model alone, as Kimi-K2 and Moonlight; names have no `language_model.`"""


class StoredEntry(NamedTuple):
    """One tensor of a released safetensors file."""

    name: str
    dtype: str
    """As safetensors calls it: F32, BF16 or I32."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedTensor:
    """A tensor of the release before INT4 packing, and the range of ours that has its elements."""

    name: str
    """The release's name."""
    shape: tuple[int, ...]
    """The release's shape; matrices are [out, in]."""
    dtype: str
    """The release's number format: bfloat16 or float32."""
    source: str
    """Name under which training holds it; experts of a layer are stacked."""
    source_shape: tuple[int, ...]
    """Shape of the whole of that."""
    start: int
    """First of its elements in the flattened whole."""
    is_expert: bool
    """Whether it is a matrix of a routed expert, which an INT4 release packs."""
    group: str
    """What shares a file in the release: `layer N`, `text`, `projector` or `tower`."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def stop(self) -> int:
        """Behind the last of its elements in the flattened whole."""
        return self.start + self.size

    def entries(self, weights: WeightFormat) -> tuple[StoredEntry, ...]:
        """What is stored of it."""
        if not (self.is_expert and weights is WeightFormat.int4):
            return (StoredEntry(self.name, SAFETENSORS_DTYPES[self.dtype], self.shape),)
        rows, columns = self.shape
        return (
            StoredEntry(f"{self.name}_packed", "I32", (rows, columns // INT4_PER_WORD)),
            StoredEntry(f"{self.name}_scale", "BF16", (rows, columns // INT4_GROUP)),
            StoredEntry(f"{self.name}_shape", "I32", (2,)),
        )


def released_tensors(model: ModelConfig, contents: Contents = Contents.all) -> Iterator[ReleasedTensor]:
    """All tensors of the release of a model, in the order of its files."""
    for group, places in _groups(model, contents):
        experts = [place for place in places if place[0].is_expert]
        for entry, number in places:
            if not entry.is_expert:
                yield from _of_entry(model, contents, group, entry, number)
        for expert in range(model.num_experts if experts else 0):
            for entry, number in experts:
                yield from _of_entry(model, contents, group, entry, number, expert)


def _groups(model: ModelConfig, contents: Contents) -> Iterator[tuple[str, list[tuple[ParameterEntry, int]]]]:
    """What shares a file in the release: its entries with the numbers of their layers or blocks."""
    for layer in range(model.num_layers):
        yield f"layer {layer}", [(entry, layer) for entry in table.TABLE.in_layer(model, layer)]
    yield "text", list(table.TABLE.places(model, Site.embedding, Site.head))
    if contents is Contents.all:
        vision = list(table.TABLE.places(model, Site.vision, Site.vision_block))
        for part, group in ((VisionPart.projector, "projector"), (VisionPart.tower, "tower")):
            yield group, [place for place in vision if VisionPart.of(place[0].name) is part]


def _of_entry(
    model: ModelConfig,
    contents: Contents,
    group: str,
    entry: ParameterEntry,
    number: int,
    expert: int = 0,
) -> Iterator[ReleasedTensor]:
    shape = entry.released_shape(model)
    start = expert * len(entry.released) * prod(shape)
    for index, pattern in enumerate(entry.released):
        name = fill(pattern, number, expert)
        yield ReleasedTensor(
            name=name.removeprefix(TEXT_PREFIX) if contents is Contents.text else name,
            shape=shape,
            dtype=entry.dtype,
            source=fill(entry.stacked_name, number),
            source_shape=entry.stacked_shape(model),
            start=start + index * prod(shape),
            is_expert=entry.is_expert,
            group=group,
        )
