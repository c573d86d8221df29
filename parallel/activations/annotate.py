"""The names that a model gives to the tensors that autograd saves.

    named("moe.up_input", tokens)                      name a tensor
    with saves("attention.output"): ...                name whatever is saved in here without a name
    normed = recomputed("norm.output", norm, hidden)   call it, name its output; it can be called again

Outside a `SavingPass`, all three only run what they are given.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from parallel.activations.policy import Policy
from parallel.activations.recompute import call_apart
from parallel.activations.saving_pass import SavingPass


def named(name: str, tensor: Tensor) -> Tensor:
    """Return `tensor`, which will be saved under this name, as will its views.

    Raises KeyError for an unknown name, ValueError if its storage has another name.
    """
    saving = SavingPass.current()
    if saving is not None:
        saving.name(name, tensor)
    return tensor


def saves(name: str) -> AbstractContextManager[None]:
    """A context in which tensors without a name are saved under this one, such as what a kernel saves itself.

    These tensors are never rounded. Raises KeyError for an unknown name.
    """
    saving = SavingPass.current()
    return nullcontext() if saving is None else saving.naming(name)


def makes_again(name: str) -> bool:
    """Whether tensors of this name are not to be saved, but made again in the backward pass, by a model that
    does so itself. Raises KeyError for an unknown name."""
    saving = SavingPass.current()
    return saving is not None and saving.policy_of(name) is Policy.recompute


def recomputed[Outputs](name: str, function: Callable[..., Outputs], *inputs: Tensor) -> Outputs:
    """Return `function(*inputs)`, whose outputs get this name and may be recomputed in the backward pass.

    Args:
        function: returns a tensor, or a tuple of tensors, and is deterministic. What it saves inside is
            recomputed with its outputs. It may use weights; their gradients are accumulated as usual.
        inputs: all activations that it reads; they should have names too.

    Raises KeyError for an unknown name.
    """
    saving = SavingPass.current()
    return call_apart(function, inputs) if saving is None else saving.call(name, function, inputs)
