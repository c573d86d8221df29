"""Global parameter names, and the initial value of each parameter from (seed, global name) alone.

A pipeline chunk numbers its layers from 0, and a rank its experts; in the whole model each has one number.
Since the initial value depends only on the seed and the global name, every layout starts from the same model.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from k25_train.parameters import table
from k25_train.parameters.entry import Initial, pattern_of

_LAYER = re.compile(r"^(language_model\.decoder\.layers\.)(\d+)\.")
_EXPERTS = re.compile(r"\.mlp\.experts\.(\w+)$")


@dataclass(frozen=True, slots=True)
class ChunkPlace:
    """Which layers and experts of the whole model a chunk has."""

    first_layer: int
    """Number, in the whole model, of the chunk's first layer."""
    first_expert: int
    """Number, in the whole model, of the rank's first expert in each layer."""

    def global_name(self, name: str) -> str:
        """A parameter's name with the layer number of the whole model; experts stay stacked."""
        return _LAYER.sub(lambda match: f"{match[1]}{int(match[2]) + self.first_layer}.", name)

    def global_tensors(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The global name and the tensor of a chunk's parameter or buffer.

        Stacked experts give one entry per expert, each a view into the stack.
        """
        name = self.global_name(name)
        stacked = _EXPERTS.search(name)
        if stacked is None:
            yield name, tensor
            return
        stem = name[: stacked.start()]
        for local, expert in enumerate(tensor.unbind(0)):
            yield f"{stem}.mlp.experts.{self.first_expert + local}.{stacked[1]}", expert


def global_state(chunk: nn.Module, place: ChunkPlace) -> Iterator[tuple[str, Tensor]]:
    """Global name and tensor (a view, without gradient) of all parameters and persistent buffers."""
    for name, tensor in chunk.state_dict(keep_vars=True).items():
        # Modules' state other than weights: None here, a tensor of bytes in Transformer Engine's modules.
        if not name.endswith("_extra_state"):
            yield from place.global_tensors(name, tensor.detach())


def initialize(chunk: nn.Module, place: ChunkPlace, seed: int, std: float) -> None:
    """Give every parameter and buffer of a chunk its initial value, in place."""
    for name, tensor in global_state(chunk, place):
        tensor.copy_(initial_value(name, tensor.shape, seed, std))


def initial_value(name: str, shape: torch.Size, seed: int, std: float) -> Tensor:
    """The initial value of the parameter or buffer `name`, float32 on the CPU, as the table says.

    Args:
        name: name in the whole model, an expert's own.
        shape: of one expert, if it is an expert's.
        seed: of the run.
        std: standard deviation of `Initial.normal` (checkpoint, `initializer_range`).

    Raises:
        KeyError: the table of parameters has no such name.
    """
    initial = table.TABLE.by_name[pattern_of(name)].kind.initial
    if initial is Initial.zeros:
        return torch.zeros(shape)
    if initial is Initial.ones:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    if initial is Initial.normal_by_inputs:
        std = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def load_global_state(chunk: nn.Module, place: ChunkPlace, state: Mapping[str, Tensor]) -> None:
    """Copy tensors of the whole model, by global name, into a chunk. Raises KeyError naming a missing one."""
    for name, tensor in global_state(chunk, place):
        if name not in state:
            raise KeyError(f"no tensor named {name!r} among the {len(state)} given")
        tensor.copy_(state[name])
