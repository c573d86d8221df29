"""Kernels of a part of a pass, by when they run and what they are for; torch-free."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

from k25_train.config.schema import Config
from k25_train.plan.assumptions import Assumptions, Compute
from k25_train.plan.cause import Cause
from k25_train.plan.kernels.kernel import Kernel, Moved, Precision, Product
from k25_train.plan.memory.kernels import Kernels, configured_kernels
from k25_train.plan.pass_sizes import PassSizes
from k25_train.plan.pipeline import StagePlan
from k25_train.plan.projections import Projection
from k25_train.plan.weight_bytes import WEIGHT_BYTES
from parallel.activations.policy import Policy

CAST_BYTES = 4
"""Bytes moved for an element of a factor that is computed with in FP8: 2 read, and 1 written in each of two
layouts, one for each product that reads it. Weights are cast once per step and not counted."""
CAST_LAUNCHES = 3
"""Kernels of a cast: the largest values, rounding, and the order that products read scales in. Source:
Transformer Engine 2.x, `quantize` with current scaling, and `swizzle_scaling_factors` of MXFP8."""
TENSOR_CAST_LAUNCHES = 4
"""The same of a tensor with one scale: zero, the largest value, the scale, rounding. Source: Transformer
Engine of August 2026, `common/recipe/current_scaling.cu`, `csrc/quantizer.cpp`; experts' one by one."""


class Phase(Enum):
    """When a kernel runs."""

    forward = "forward"
    """In the forward pass."""
    backward = "backward"
    """In the backward pass, before its gradient can be passed on."""
    weights = "weights"
    """In the backward pass; only the weights' gradients wait for it."""


@dataclass(frozen=True, slots=True)
class Work:
    """A kernel of a pass."""

    phase: Phase
    """When it runs."""
    cause: Cause
    """What it is for."""
    kernel: Kernel
    """What is computed."""
    precision: Precision
    """Number format of its factors."""


@dataclass(frozen=True)
class Setting:
    """What kernels of one rank depend on: the model, a micro-batch, policies and how code works."""

    config: Config
    """The configuration."""
    assumptions: Assumptions
    """What else the plan assumes."""
    sizes: PassSizes
    """The micro-batch."""

    @staticmethod
    def of(stage: StagePlan) -> "Setting":
        """Of a stage's ranks, whose experts get what is assumed."""
        return Setting(stage.config, stage.assumptions, stage.balanced_sizes)

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch on the rank."""
        return self.sizes.tokens

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of features."""
        return WEIGHT_BYTES[self.config.train.dtype]

    @property
    def plain(self) -> Precision:
        """Number format of what is never computed in FP8."""
        return Precision.of(self.config.train.dtype)

    @property
    def casts(self) -> bool:
        """Whether layers compute in FP8."""
        return self.assumptions.code.compute is Compute.fp8

    @property
    def of_layers(self) -> Precision:
        """Number format of products of layers."""
        return Precision.fp8 if self.casts else self.plain

    @property
    def sent_bytes(self) -> int:
        """Bytes of an element on its way to experts."""
        return min(self.assumptions.code.dispatch_bytes, self.element_bytes)

    @property
    def sends_fp8(self) -> bool:
        """Whether what goes to experts is in the format in which they compute, FP8."""
        return self.casts and self.sent_bytes == 1

    @property
    def of_attention(self) -> Precision:
        """Number format of attention."""
        return Precision.fp8 if self.casts and self.assumptions.code.attention_in_fp8 else self.plain

    @property
    def fuses_elementwise(self) -> bool:
        """Whether SwiGLU, rotary embedding and loss are one kernel each."""
        return self.assumptions.code.fused_elementwise

    @property
    def fuses_swiglu(self) -> bool:
        """Whether experts' SwiGLU is one kernel."""
        return self.fuses_elementwise or self.assumptions.code.fused_swiglu

    @property
    def cast_bytes(self) -> int:
        """Bytes moved for an element that is cast to FP8: read once more where its tensor has one scale
        (Transformer Engine 2.20, current scaling)."""
        return CAST_BYTES + 2 * self.assumptions.code.scales_per_tensor

    @property
    def fuses_routing(self) -> bool:
        """Whether router and permutation are Transformer Engine's kernels."""
        return self.fuses_elementwise or self.config.train.transformer_engine

    @cached_property
    def kernels(self) -> Kernels:
        """Which kernels there are."""
        return configured_kernels(self.config)

    @cached_property
    def policies(self) -> dict[str, Policy]:
        """Name -> policy of every activation."""
        return self.config.activation.policies()

    def projected(
        self,
        projection: Projection,
        rows: float,
        *,
        groups: int = 1,
        is_plain: bool = False,
        casts_input: bool = True,
        casts_gradient: bool = True,
        made_again: str = "",
    ) -> Iterator[Work]:
        """A product with weights, its gradients, and casts of its factors if it is in FP8.

        Args:
            projection: the matrix, or one of equal ones.
            rows: rows that are multiplied by each of `groups` matrices.
            groups: matrices that run as one grouped product.
            is_plain: whether it is never in FP8.
            casts_input: whether its input in FP8 is made by a kernel of its own.
            casts_gradient: the same of the gradient of its output.
            made_again: name of the activation with whose policy the product is computed again; none if empty.
        """
        name, inputs, outputs = projection.name, projection.inputs, projection.outputs
        precision = self.plain if is_plain else self.of_layers
        forward = Product(name, rows, outputs, inputs, groups)
        backward = Product(f"{name}, by input", rows, inputs, outputs, groups)
        of_weights = Product(f"{name}, by weights", outputs, inputs, rows, groups, accumulates=True)
        found = [Work(Phase.forward, Cause.compute, forward, precision)]
        is_fp8 = precision is Precision.fp8
        launches = CAST_LAUNCHES
        if self.assumptions.code.scales_per_tensor:
            launches = TENSOR_CAST_LAUNCHES * groups
        if is_fp8 and casts_input:
            found += self.moved(
                f"{name}, in FP8", groups * rows * inputs * self.cast_bytes, 0, launches=(launches, 0)
            )
        yield from self.and_again(found, made_again)
        if is_fp8 and casts_gradient:
            yield from self.moved(
                f"{name}, gradient in FP8",
                0,
                groups * rows * outputs * self.cast_bytes,
                launches=(0, launches),
            )
        yield Work(Phase.backward, Cause.compute, backward, precision)
        if self.config.optim.language_model.trained:
            yield Work(Phase.weights, Cause.compute, of_weights, precision)

    def moved(
        self,
        name: str,
        forward_bytes: float,
        backward_bytes: float,
        *,
        launches: tuple[int, int] = (1, 1),
        made_again: str = "",
    ) -> list[Work]:
        """Kernels that move so many bytes forward and backward; those forward are run again by the policy of
        `made_again`."""
        found = list[Work]()
        if forward_bytes or launches[0]:
            found += self.and_again(
                [self._moved(Phase.forward, name, forward_bytes, launches[0])], made_again
            )
        if backward_bytes or launches[1]:
            found.append(self._moved(Phase.backward, f"{name}, backward", backward_bytes, launches[1]))
        return found

    def _moved(self, phase: Phase, name: str, num_bytes: float, launches: int) -> Work:
        return Work(phase, Cause.memory_bound, Moved(name, num_bytes, launches), self.plain)

    def and_again(self, works: Iterable[Work], name: str) -> Iterator[Work]:
        """Forward work, and the same in the backward pass if the policy of an activation asks for it."""
        found = list(works)
        yield from found
        if self.recomputes(name):
            yield from again(found)

    def recomputes(self, name: str) -> bool:
        """Whether an activation is made again; none is if whole layers are."""
        is_whole = self.assumptions.code.recomputes_layers
        return not is_whole and self.policies.get(name) is Policy.recompute


def again(works: Iterable[Work]) -> Iterator[Work]:
    """Forward work once more, in the backward pass."""
    for each in works:
        if each.phase is Phase.forward:
            yield replace(each, phase=Phase.backward, cause=Cause.recompute)
