"""Every tensor of the released checkpoint, and how many parameters the model has, from the configuration
alone; torch-free.

Names and shapes are those of moonshotai/Kimi-K2.5, with routed experts as they are before INT4 packing. The
buffer that the checkpoint holds along with the parameters (the router's correction bias) is listed as well
and marked, since a map of the checkpoint needs it, but is not counted.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import NamedTuple

from k25_train.config.model import ModelConfig
from k25_train.parameters import table
from k25_train.parameters.entry import ParameterEntry, fill
from k25_train.parameters.table import EMBEDDING, EXPERTS, VISION_MODULES


class TensorSpec(NamedTuple):
    """One tensor of the checkpoint."""

    name: str
    """Name in the checkpoint."""
    shape: tuple[int, ...]
    """Shape in the checkpoint; matrices are [out, in]."""
    module: str
    """Part of the model in which it is counted."""
    dtype: str = "bfloat16"
    """Number format in the checkpoint."""
    is_buffer: bool = False
    """Whether its module keeps it, instead of the optimizer."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleCount:
    """Parameters of one part of the model."""

    module: str
    """Name of the part."""
    num_tensors: int
    """Trained tensors."""
    total: int
    """Parameters."""
    active: int
    """Parameters that one token of text passes; an image's tokens pass vision instead of the embedding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Parameters of the model, by part and in sum."""

    modules: tuple[ModuleCount, ...]
    """Parts in the order of the forward pass."""
    total: int
    """All parameters."""
    active: int
    """Parameters of the language model that a token of text uses, both embeddings included."""
    active_without_embedding: int
    """Active parameters without the input embedding, of which a token reads one row."""
    vision: int
    """Parameters of vision tower and projector."""


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters of every part of the model."""
    num_tensors: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for entry, _ in table.TABLE.places(model):
        if not entry.kind.is_buffer:
            number = len(entry.released) * (model.num_experts if entry.is_expert else 1)
            num_tensors[entry.module] += number
            sizes[entry.module] += number * prod(entry.released_shape(model))
    modules = tuple(
        ModuleCount(
            module=module,
            num_tensors=num_tensors[module],
            total=size,
            active=active_size(model, module, size),
        )
        for module, size in sizes.items()
    )
    active = sum(module.active for module in modules)
    embedding = sum(module.active for module in modules if module.module == EMBEDDING)
    return ParameterCount(
        modules=modules,
        total=sum(module.total for module in modules),
        active=active,
        active_without_embedding=active - embedding,
        vision=sum(module.total for module in modules if module.module in VISION_MODULES),
    )


def active_size(model: ModelConfig, module: str, size: int) -> int:
    """How many of a part's parameters one token of text uses."""
    if module in VISION_MODULES:
        return 0
    if module == EXPERTS:
        return size // model.num_experts * model.num_experts_per_token
    return size


def iterate_tensors(model: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of the model's checkpoint, in the order of the forward pass."""
    for (number, is_expert), group in groupby(
        table.TABLE.places(model), key=lambda place: (place[1], place[0].is_expert)
    ):
        entries = [entry for entry, _ in group]
        shapes = [entry.released_shape(model) for entry in entries]
        # One expert follows another; each has all of its tensors together.
        for expert in range(model.num_experts if is_expert else 1):
            for entry, shape in zip(entries, shapes, strict=True):
                for name in entry.released:
                    yield _spec(entry, fill(name, number, expert), shape)


def _spec(entry: ParameterEntry, name: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name, shape, entry.module, entry.dtype, entry.kind.is_buffer)
