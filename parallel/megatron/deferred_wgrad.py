"""Weight gradients computed later than the gradients that are passed to the previous layer.

A pipeline stage waits for the gradient of its output, and the previous stage for the gradient of its input;
nobody waits for the gradients of its weights before the step ends. megatron-core's overlapped schedule
(`overlap_moe_expert_parallel_comm` with `delay_wgrad_compute`) therefore calls `backward_dw()` apart from
backward, while the expert all-to-all and the pipeline's messages are in flight (K2 report, section 2.4). In
megatron-core only Transformer Engine's layers have one that does anything (`tensor_parallel/layers.py`, "Not
supported - does nothing"); here the others get one, on the CPU and on CUDA.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn


class DeferredWgrads:
    """The weight gradients that a module's backward passes have deferred.

    With `overlap_grad_reduce`, data parallelism reduces a bucket when its last gradient is complete. It
    learns that from autograd, which never sees these; so it gives one hook per weight to the module that owns
    it (`DistributedDataParallel`, `delay_wgrad_compute`), which is called when the gradient is complete.
    """

    def __init__(self) -> None:
        self.pending: deque[tuple[nn.Parameter, Callable[[], Tensor]]] = deque()
        self.when_accumulated: list[Callable[[], None]] = []

    def add(self, weight: nn.Parameter, compute: Callable[[], Tensor]) -> None:
        """Defer the gradient of `weight`; `compute` returns it in the weight's shape and dtype."""
        self.pending.append((weight, compute))

    @torch.no_grad()
    def compute(self) -> None:
        """Compute the pending gradients, oldest first, and add them to `weight.grad`."""
        while self.pending:
            weight, compute = self.pending.popleft()
            gradient = compute()
            weight.grad = gradient if weight.grad is None else weight.grad + gradient
        for hook in self.when_accumulated:
            hook()


def defer_wgrads(module: nn.Module, *weights: nn.Parameter) -> DeferredWgrads:
    """Let `module` own the gradients of `weights`: data parallelism hooks into it instead of autograd."""
    wgrads = DeferredWgrads()
    module.register_wgrad_accumulation_and_reduce_hooks = wgrads.when_accumulated.append  # type: ignore[assignment]
    for weight in weights:
        weight.skip_backward_post_hook = True  # type: ignore[attr-defined]
    return wgrads


class _Linear(torch.autograd.Function):
    """`F.linear` whose weight gradient stays pending in backward."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: nn.Parameter, wgrads: DeferredWgrads) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.weight, ctx.wgrads = weight, wgrads
        return F.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        inputs, weight = ctx.saved_tensors
        (gradient,) = gradients

        def wgrad() -> Tensor:
            return gradient.flatten(0, -2).T @ inputs.flatten(0, -2)

        ctx.wgrads.add(ctx.weight, wgrad)
        return gradient @ weight, None, None


class _GroupedLinear(torch.autograd.Function):
    """`grouped_mm` of rows with their group's matrix; the gradient of the matrices stays pending."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: nn.Parameter, ends: Tensor, wgrads: DeferredWgrads
    ) -> Tensor:
        ctx.save_for_backward(rows, weights, ends)
        ctx.weights, ctx.wgrads = weights, wgrads
        return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        rows, weights, ends = ctx.saved_tensors
        gradient = gradients[0].contiguous()

        def wgrad() -> Tensor:
            return F.grouped_mm(gradient.T, rows, offs=ends)

        ctx.wgrads.add(ctx.weights, wgrad)
        return F.grouped_mm(gradient, weights, offs=ends), None, None, None


def linear_deferring_wgrad(inputs: Tensor, weight: nn.Parameter, wgrads: DeferredWgrads) -> Tensor:
    """inputs [..., In] times weight [Out, In]: [..., Out]; the weight's gradient stays pending."""
    return _Linear.apply(inputs, weight, wgrads)


def grouped_linear_deferring_wgrad(
    rows: Tensor, weights: nn.Parameter, ends: Tensor, wgrads: DeferredWgrads
) -> Tensor:
    """rows [T, In], grouped, times weights [E, Out, In]: [T, Out]; the weights' gradient stays pending.

    Args:
        ends: [E] int32, end (exclusive) of each group's rows.
    """
    return _GroupedLinear.apply(rows, weights, ends, wgrads)


def delay_linear_wgrads(layers: nn.Module) -> None:
    """Let each of megatron-core's linear layers inside `layers` defer its weight gradient.

    Set on the modules rather than in subclasses: MLA compares the classes of its linear layers with a list.
    """
    for module in layers.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            wgrads = defer_wgrads(module, module.weight)
            module._forward_impl = partial(_forward_impl, wgrads)
            module.backward_dw = wgrads.compute


def _forward_impl(wgrads: DeferredWgrads, input: Tensor, weight: nn.Parameter, *_: Any, **__: Any) -> Tensor:
    return linear_deferring_wgrad(input, weight, wgrads)
