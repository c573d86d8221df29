"""Functions whose outputs and inner tensors are not kept from forward to backward, but made again.

`torch.utils.checkpoint` makes again what a function saves inside, but not its output, which the next
operation saves: for a norm that is all there is to gain. Here output and inside are made again together,
once, whichever is needed first; inputs may wait in any form: compressed, in the host, to be made again too.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from parallel.activations.saved import Packed


class Replay:
    """A call of a function without randomness, to be made again."""

    def __init__(
        self, function: Callable[..., Any], inputs: Sequence["Packed"], need_grad: Sequence[bool]
    ) -> None:
        """
        Args:
            function: from tensors to a tensor or a tuple of them.
            inputs: what stands for its inputs.
            need_grad: whether each input needs a gradient.
        """
        self._function, self._inputs, self._need_grad = function, inputs, need_grad
        self._leaves: list[Tensor] = []
        self._outputs: tuple[Tensor, ...] = ()

    def outputs(self) -> tuple[Tensor, ...]:
        """The outputs, with the graph from their inputs; the function runs once until `backward`."""
        if not self._outputs:
            # saved.py imports this module.
            from parallel.activations.saved import unpack

            self._leaves = [
                unpack(packed).detach().requires_grad_(needs)
                for packed, needs in zip(self._inputs, self._need_grad, strict=True)
            ]
            with torch.enable_grad():
                self._outputs = as_tuple(self._function(*self._leaves))
        return self._outputs

    def backward(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the inputs; the weights' are accumulated, as in any backward pass."""
        pairs = [
            (output, gradient)
            for output, gradient in zip(self.outputs(), gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        if pairs:
            outputs, given = zip(*pairs, strict=True)
            torch.autograd.backward(outputs, given)
        found = [leaf.grad for leaf in self._leaves]
        self._leaves, self._outputs = [], ()
        return found


class ReplayedCall(torch.autograd.Function):
    """Calls a replay's function now without a graph, and its backward when that is due."""

    @staticmethod
    def forward(ctx: Any, replay: Replay, function: Callable[..., Any], *inputs: Tensor) -> Any:
        ctx.replay = replay
        ctx.set_materialize_grads(False)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # Modules may hold the graph beyond its backward pass; what the replay holds is not to last as long.
        replay, ctx.replay = ctx.replay, None
        if replay is None:
            raise RuntimeError("what is recomputed can be gone through backward once only")
        return None, None, *replay.backward(gradients)


def call_apart(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
    """Call a function so that its gradients have the bits that a replay's have.

    What reads an input several times, as a norm does, adds up its gradients; a replay does so before the
    gradients of others that read that input are added. Views in between make autograd do the same.
    """
    return function(*[tensor.view_as(tensor) for tensor in inputs])


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """What a function returned, as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)
