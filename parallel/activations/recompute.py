"""Functions whose outputs and inner tensors are recomputed in the backward pass instead of kept.

`torch.utils.checkpoint` recomputes what a function saves inside, but not its output, which the next operation
saves: for a norm, that is all there is to gain. Here the output and what is saved inside are recomputed
together, once, when either is first needed. Inputs may be packed in any form: in FP8, in the host, or
to be recomputed too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


class Recomputation:
    """A call of a deterministic function, to be repeated in the backward pass."""

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Callable[[], Tensor]],
        need_grad: Sequence[bool],
    ) -> None:
        """
        Args:
            function: takes tensors, returns a tensor or a tuple of them.
            inputs: for each input, a function that restores it.
            need_grad: for each input, whether it needs a gradient.
        """
        self._function, self._inputs, self._need_grad = function, inputs, need_grad
        self._leaves: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._edges: list[GradientEdge | None] = []

    def outputs(self) -> list[Tensor]:
        """The outputs, detached. The function runs at most once before `backward`."""
        if not self._outputs:
            # Leaves collect the gradients of the inputs, apart from the graph that the inputs were part of.
            self._leaves = [
                restore().detach().requires_grad_(needs)
                for restore, needs in zip(self._inputs, self._need_grad, strict=True)
            ]
            # The graph of this call hangs on the edges; the outputs are handed out without it.
            with torch.enable_grad():
                outputs = as_tuple(self._function(*self._leaves))
            self._edges = [get_gradient_edge(each) if each.requires_grad else None for each in outputs]
            self._outputs = [each.detach() for each in outputs]
        return self._outputs

    def backward(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the inputs; those of weights are accumulated, as in any backward pass."""
        self.outputs()
        edges = [
            (edge, gradient)
            for edge, gradient in zip(self._edges, gradients, strict=True)
            if edge is not None and gradient is not None
        ]
        # From here on only the outputs' history is read.
        self._outputs, self._edges = [], []
        if edges:
            torch.autograd.backward([edge for edge, _ in edges], [gradient for _, gradient in edges])
        found = [leaf.grad for leaf in self._leaves]
        self._leaves = []
        return found


class RecomputedCall(torch.autograd.Function):
    """Calls a function without a graph; its backward pass goes through the recomputation."""

    @staticmethod
    def forward(ctx: Any, recomputation: Recomputation, function: Callable[..., Any], *inputs: Tensor) -> Any:
        ctx.recomputation = recomputation
        ctx.set_materialize_grads(False)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # Modules may hold the graph beyond its backward pass; the recomputation must not live as long.
        recomputation, ctx.recomputation = ctx.recomputation, None
        if recomputation is None:
            raise RuntimeError("a recomputed call can go backward only once: its tensors are gone")
        return None, None, *recomputation.backward(gradients)


def call_apart(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
    """Call a function such that its gradients are bitwise equal to those of a recomputation.

    A function that reads an input several times, as a norm does, adds up that input's gradients. A
    recomputation does so before those of the input's other readers are added; a view per input makes autograd
    add in the same order.
    """
    return function(*[tensor.view_as(tensor) for tensor in inputs])


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """What a function returned, as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)
