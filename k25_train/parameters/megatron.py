"""Every parameter as training holds it, from the configuration alone; torch-free.

Names are megatron-core's. Three layouts differ from the checkpoint's: gate and up projection are one matrix,
the experts of a layer are stacked, and the patch embedding is a matrix.
"""

from collections.abc import Iterable, Iterator
from math import prod
from typing import NamedTuple

from k25_train.config.model import ModelConfig
from k25_train.parameters import table
from k25_train.parameters.entry import ParameterEntry, Site, fill


class TrainedParameter(NamedTuple):
    """One parameter, whole: as a rank has it that holds all experts of the layer."""

    name: str
    """Name in the whole model; the experts of a layer are stacked under one name."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def is_expert(self) -> bool:
        """Whether it is stacked routed experts, cut over expert-parallel ranks along the first axis."""
        return ".mlp.experts." in self.name


def iterate_parameters(model: ModelConfig) -> Iterator[TrainedParameter]:
    """Every parameter of the model, in the order of the forward pass."""
    return _parameters(model, table.TABLE.places(model))


def embedding_parameter(model: ModelConfig) -> TrainedParameter:
    """The word embedding."""
    (parameter,) = _parameters(model, table.TABLE.places(model, Site.embedding))
    return parameter


def head_parameters(model: ModelConfig) -> Iterator[TrainedParameter]:
    """Parameters after the last layer."""
    return _parameters(model, table.TABLE.places(model, Site.head))


def layer_parameters(model: ModelConfig, layer: int) -> Iterator[TrainedParameter]:
    """One decoder layer, counted from 0."""
    return _parameters(model, ((entry, layer) for entry in table.TABLE.in_layer(model, layer)))


def vision_parameters(model: ModelConfig) -> Iterator[TrainedParameter]:
    """Vision tower and projector."""
    return _parameters(model, table.TABLE.places(model, Site.vision, Site.vision_block))


def _parameters(
    model: ModelConfig, places: Iterable[tuple[ParameterEntry, int]]
) -> Iterator[TrainedParameter]:
    for entry, number in places:
        if not entry.kind.is_buffer:
            yield TrainedParameter(fill(entry.stacked_name, number), entry.stacked_shape(model))
