"""Weight gradients of linear layers: added up in float32 where data parallelism keeps them, at once or later.

Autograd would round each micro-batch's gradient to the weight's type and leave it to data parallelism to add
it to `main_grad`: a second pass over memory, and a tensor of the size of the weights. Here the matrix product
itself adds to `main_grad`, in float32, as megatron-core and Transformer Engine do where they "fuse gradient
accumulation". One decision for all of a model's linear layers: `accumulate_in_main_grad`.

They can also wait. A pipeline stage waits for the gradient of its output, and the previous stage for the
gradient of its input; nobody waits for the gradients of its weights before the step ends. megatron-core's
overlapped schedule (`overlap_moe_expert_parallel_comm` with `delay_wgrad_compute`) therefore calls
`backward_dw()` apart from backward, while the expert all-to-all and the pipeline's messages are in flight (K2
report, section 2.4). In megatron-core only Transformer Engine's layers have one that does anything
(`tensor_parallel/layers.py`, "Not supported - does nothing"); here the others get one, on CPU and CUDA alike.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import Tensor, nn

from parallel.megatron.weight_gradient import LinearGradient, WeightGradient


class WeightGradients:
    """Takes the gradients of a module's weights from its backward passes, and tells when they are complete.

    With `overlap_grad_reduce`, data parallelism reduces a bucket when its last gradient is complete. It
    learns that from autograd, which never sees these; so it gives one hook per weight to the module that owns
    it (`DistributedDataParallel`, `delay_wgrad_compute`), which is called when the gradient is complete.
    """

    def __init__(self, *weights: nn.Parameter, later: bool) -> None:
        """
        Args:
            weights: each is used once per forward pass.
            later: compute gradients in `compute` instead of in the backward pass.
        """
        self.later = later
        self.pending: deque[tuple[nn.Parameter, WeightGradient]] = deque()
        self.when_accumulated: list[Callable[[], None]] = []
        self._weights, self._num_accumulated = weights, 0
        self._placeholders: dict[nn.Parameter, Tensor] = {}

    def add(self, weight: nn.Parameter, gradient: WeightGradient) -> Tensor | None:
        """Take the gradient of `weight` from a backward pass.

        Returns what that pass gives autograd: None, or a gradient in the weight's type if it is not to be
        computed later and the weight has no `main_grad`, since no data parallelism is around it.
        """
        if self.later:
            self.pending.append((weight, gradient))
            return None
        return self.add_now(weight, gradient)

    def add_now(self, weight: nn.Parameter, gradient: WeightGradient) -> Tensor | None:
        """The same, for a gradient whose computation cannot wait. Raises ValueError if others do wait."""
        if self.later:
            raise ValueError("a gradient cannot be added now where others of the same weight wait")
        if not hasattr(weight, "main_grad"):
            return _rounded(weight, gradient)
        self._accumulate(weight, gradient)
        self._num_accumulated += 1
        if self._num_accumulated == sum(each.requires_grad for each in self._weights):
            self._num_accumulated = 0
            self._tell()
        return None

    @torch.no_grad()
    def compute(self) -> None:
        """Compute the gradients that were left for later, oldest first."""
        if not self.later:
            return
        while self.pending:
            weight, gradient = self.pending.popleft()
            if hasattr(weight, "main_grad"):
                self._accumulate(weight, gradient)
            else:
                found = _rounded(weight, gradient)
                weight.grad = found if weight.grad is None else weight.grad + found
        self._tell()

    def _accumulate(self, weight: nn.Parameter, gradient: WeightGradient) -> None:
        gradient.add_to(weight.main_grad)  # type: ignore[attr-defined]
        # Data parallelism's hook asserts that there is a gradient, and adds it unless it has been added. One
        # element of memory suffices for that: Transformer Engine's placeholders are as large as the weights.
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        if weight not in self._placeholders:
            self._placeholders[weight] = weight.new_zeros(()).expand(weight.shape)
        weight.grad = self._placeholders[weight]

    def _tell(self) -> None:
        for hook in self.when_accumulated:
            hook()


def _rounded(weight: nn.Parameter, gradient: WeightGradient) -> Tensor:
    total = torch.zeros_like(weight, dtype=torch.float32)
    gradient.add_to(total)
    return total.to(weight.dtype)


def own_weight_gradients(module: nn.Module, *weights: nn.Parameter, later: bool) -> WeightGradients:
    """Let `module` own the gradients of `weights`: data parallelism hooks into it instead of autograd."""
    wgrads = WeightGradients(*weights, later=later)
    module.register_wgrad_accumulation_and_reduce_hooks = wgrads.when_accumulated.append  # type: ignore[assignment]
    for weight in weights:
        weight.skip_backward_post_hook = True  # type: ignore[attr-defined]
    return wgrads


class _Linear(torch.autograd.Function):
    """`F.linear` whose weight gradient goes to a `WeightGradients`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: nn.Parameter, wgrads: WeightGradients) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        # Saved tensors come back without Python attributes, such as `main_grad`, where hooks pack them.
        ctx.weight, ctx.wgrads = weight, wgrads
        return F.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        inputs, weight = ctx.saved_tensors
        of_inputs = gradients[0] @ weight if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = ctx.wgrads.add(ctx.weight, LinearGradient(gradients[0], inputs))
        return of_inputs, of_weight, None


def linear(inputs: Tensor, weight: nn.Parameter, wgrads: WeightGradients) -> Tensor:
    """inputs [..., In] times weight [Out, In]: [..., Out]; the weight's gradient goes to `wgrads`."""
    return _Linear.apply(inputs, weight, wgrads)


@dataclass(frozen=True, slots=True)
class _EmbeddingGradient:
    output_gradient: Tensor
    """[..., D]."""
    ids: Tensor
    """[...] int64."""

    def add_to(self, total: Tensor) -> None:
        rows = self.output_gradient.flatten(0, -2).to(total.dtype)
        total.index_add_(0, self.ids.flatten(), rows)


class _Embedding(torch.autograd.Function):
    """`F.embedding` whose gradient, of the rows that were looked up, goes to a `WeightGradients`."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: nn.Parameter, wgrads: WeightGradients) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.wgrads = weight, wgrads
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, None]:
        (ids,) = ctx.saved_tensors
        return None, ctx.wgrads.add(ctx.weight, _EmbeddingGradient(gradients[0], ids)), None


def embedding(ids: Tensor, weight: nn.Parameter, wgrads: WeightGradients) -> Tensor:
    """Rows `ids` [...] int64 of weight [V, D]: [..., D]; the weight's gradient goes to `wgrads`."""
    return _Embedding.apply(ids, weight, wgrads)


def accumulate_in_main_grad(model: nn.Module, *, later: Callable[[str], bool]) -> None:
    """Let the weight gradients of all linear layers inside `model`, and of its input embedding, be added to
    `main_grad` in float32.

    megatron-core's own layers get the product above, with and without Apex, whose kernel their
    `gradient_accumulation_fusion` would insist on. Transformer Engine's have one; `main_grad` must be there
    before their backward pass. Set on the modules rather than in subclasses: MLA compares the classes of its
    linear layers with a list.

    Args:
        later: whether a layer, by its name in `model`, leaves its gradient to `backward_dw`. Transformer
            Engine's layers know by their configuration.
    """
    for name, module in model.named_modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            wgrads = own_weight_gradients(module, module.weight, later=later(name))
            module.weight_gradients = wgrads
            module._forward_impl = partial(_forward_impl, wgrads)
            module.backward_dw = wgrads.compute
        elif isinstance(module, VocabParallelEmbedding):
            # The whole vocabulary: tensor parallelism is not used here.
            wgrads = own_weight_gradients(module, module.weight, later=False)
            module.forward = partial(embedding, weight=module.weight, wgrads=wgrads)
        elif hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def weight_gradients_of(module: ColumnParallelLinear | RowParallelLinear) -> WeightGradients:
    """Where the gradients of a linear layer's weight go, after `accumulate_in_main_grad`."""
    return module.weight_gradients


def _forward_impl(wgrads: WeightGradients, input: Tensor, weight: nn.Parameter, *_: Any, **__: Any) -> Tensor:
    return linear(input, weight, wgrads)
