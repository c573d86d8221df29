"""Functions whose outputs and inner tensors are not kept from forward to backward, but made again.

`torch.utils.checkpoint` makes again what a function saves inside, but not its output, which the next
operation saves: for a norm that is all there is to gain. Here output and inside are made again together,
once, whichever is needed first; inputs may wait in any form: compressed, in the host, to be made again too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


class Recomputation:
    """A call of a function without randomness, to be made again."""

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Callable[[], Tensor]],
        need_grad: Sequence[bool],
    ) -> None:
        """
        Args:
            function: from tensors to a tensor or a tuple of them.
            inputs: what brings each input back.
            need_grad: whether each input needs a gradient.
        """
        self._function, self._inputs, self._need_grad = function, inputs, need_grad
        self._leaves: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._edges: list[GradientEdge | None] = []

    def outputs(self) -> list[Tensor]:
        """The outputs, without history. The function runs once until `backward`."""
        if not self._outputs:
            self._leaves = [
                bring_back().detach().requires_grad_(needs)
                for bring_back, needs in zip(self._inputs, self._need_grad, strict=True)
            ]
            with torch.enable_grad():
                outputs = as_tuple(self._function(*self._leaves))
            self._edges = [get_gradient_edge(each) if each.requires_grad else None for each in outputs]
            self._outputs = [each.detach() for each in outputs]
        return self._outputs

    def backward(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the inputs; the weights' are accumulated, as in any backward pass."""
        self.outputs()
        edges = [
            (edge, gradient)
            for edge, gradient in zip(self._edges, gradients, strict=True)
            if edge is not None and gradient is not None
        ]
        # What follows reads the outputs' history only.
        self._outputs, self._edges = [], []
        if edges:
            torch.autograd.backward([edge for edge, _ in edges], [gradient for _, gradient in edges])
        found = [leaf.grad for leaf in self._leaves]
        self._leaves = []
        return found


class RecomputedCall(torch.autograd.Function):
    """Calls a function now without a graph, and goes backward through its recomputation when that is due."""

    @staticmethod
    def forward(ctx: Any, recomputation: Recomputation, function: Callable[..., Any], *inputs: Tensor) -> Any:
        ctx.recomputation = recomputation
        ctx.set_materialize_grads(False)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # Modules may hold the graph beyond its backward pass; what this holds is not to last as long.
        recomputation, ctx.recomputation = ctx.recomputation, None
        if recomputation is None:
            raise RuntimeError("what is recomputed can be gone through backward once only")
        return None, None, *recomputation.backward(gradients)


def call_apart(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
    """Call a function so that its gradients have the bits that a recomputation's have.

    What reads an input several times, as a norm does, adds up its gradients; a recomputation does so before
    the gradients of others that read that input are added. Views in between make autograd do the same.
    """
    return function(*[tensor.view_as(tensor) for tensor in inputs])


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """What a function returned, as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)
