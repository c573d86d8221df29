"""Where the tensors of a rank's modules are in the whole model: names, shapes and first elements.

A chunk numbers its layers from 0 and a rank its experts; a checkpoint knows neither. There is no tensor
parallelism: parameters are whole, and stacks of experts are cut along their first axis. So whatever a rank
holds is one range of elements of a flattened whole tensor.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

_LAYER = re.compile(r"(.*\.layers\.)(\d+)")
_EXPERTS = ".mlp.experts."


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """A parameter or buffer of a module, with its place in the whole model."""

    tensor: Tensor
    """As the module has it, without gradient."""
    parameter: nn.Parameter | None
    """The parameter that it is; None for a buffer."""
    name: str
    """Name in the whole model; the experts of a layer are stacked under one name."""
    shape: tuple[int, ...]
    """Of the whole tensor, with all experts of the layer."""
    start: int
    """Index of the module's first element in the flattened whole tensor."""

    @property
    def is_expert(self) -> bool:
        """Whether expert-parallel ranks hold different ranges of it."""
        return _EXPERTS in self.name

    @property
    def flat(self) -> Tensor:
        """A view [n] of the elements."""
        return self.tensor.view(-1)


def held_tensors(replica: DistributedDataParallel, ep_rank: int | None = None) -> Iterator[HeldTensor]:
    """All parameters and persistent buffers of a wrapped module, in its order.

    Args:
        replica: a model chunk, or the decoupled encoder, which is whole.
        ep_rank: the expert-parallel rank to answer for; by default this rank's.
    """
    ep_size = replica.ep_group.size()
    ep_rank = replica.ep_group.rank() if ep_rank is None else ep_rank
    module: nn.Module = replica.module
    numbers = _layer_numbers(module)
    for name, tensor in module.state_dict(keep_vars=True).items():
        # Modules' state other than weights: None here, a tensor of bytes in Transformer Engine's modules.
        if name.endswith("_extra_state"):
            continue
        shape, start = tuple(tensor.shape), 0
        if _EXPERTS in name:
            shape, start = (shape[0] * ep_size, *shape[1:]), ep_rank * tensor.numel()
        parameter = tensor if isinstance(tensor, nn.Parameter) else None
        yield HeldTensor(tensor.detach(), parameter, _global_name(name, numbers), shape, start)


def _layer_numbers(module: nn.Module) -> dict[str, str]:
    """Name of each decoder layer in a chunk, with a dot -> its name in the whole model, with a dot."""
    numbers = {}
    for name, layer in module.named_modules():
        match, number = _LAYER.fullmatch(name), getattr(layer, "layer_number", None)
        if match and number is not None:
            # megatron-core counts the layers of the whole model from 1.
            numbers[f"{name}."] = f"{match[1]}{number - 1}."
    return numbers


def _global_name(name: str, numbers: dict[str, str]) -> str:
    match = _LAYER.match(name)
    local = f"{match[0]}." if match else ""
    return f"{numbers[local]}{name[len(local) :]}" if local in numbers else name
