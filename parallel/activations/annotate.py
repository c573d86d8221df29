"""The names that a model gives to what autograd saves of it.

    named("moe.up_input", tokens)                      these elements have the name
    with saves("attention.output"): ...                so has what is saved in here and has none yet
    normed = recomputed("norm.output", norm, hidden)   call it; the output has the name and can be made again

Outside of a `SavingPass` all three do nothing but run what they are given.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from parallel.activations.recompute import call_apart
from parallel.activations.saving_pass import SavingPass


def named(name: str, tensor: Tensor) -> Tensor:
    """`tensor`, which is saved under this name wherever it, or a view of it, is saved.

    Raises KeyError for an unknown name, ValueError if its memory has another.
    """
    saving = SavingPass.current()
    if saving is not None:
        saving.name(name, tensor)
    return tensor


def saves(name: str) -> AbstractContextManager[None]:
    """A stretch in which what is saved without a name gets this one: what a kernel keeps for itself, say.

    Such tensors are never rounded. Raises KeyError for an unknown name.
    """
    saving = SavingPass.current()
    return nullcontext() if saving is None else saving.naming(name)


def recomputed[Outputs](name: str, function: Callable[..., Outputs], *inputs: Tensor) -> Outputs:
    """`function(*inputs)`, whose outputs have this name and may be made again in the backward pass.

    Args:
        function: makes a tensor, or a tuple of them, the same each time: without randomness. What it saves
            inside is made again with them. It may use weights; their gradients are accumulated as always.
        inputs: all activations that it reads; give them names of their own.

    Raises KeyError for an unknown name.
    """
    saving = SavingPass.current()
    return call_apart(function, inputs) if saving is None else saving.call(name, function, inputs)
