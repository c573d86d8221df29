"""Gradients of weights that are not computed yet, and the product that adds them up in float32."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class WeightGradient(Protocol):
    """The gradient of a weight from one micro-batch, not computed yet."""

    def add_to(self, total: Tensor) -> None:
        """Add it to `total`, which has the weight's shape, in the type of `total`."""
        ...


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [N, M] float32 += left [K, N] transposed, times right [K, M], in float32.

    On CUDA one cuBLAS call with bfloat16 operands reads and writes `total`, as Apex's
    `fused_weight_gradient_mlp_cuda` makes it; torch 2.13 has it as `addmm` with `out_dtype`. On the CPU the
    product of the exact values in float32 is added to `total`.
    """
    if total.device.type == "cpu":
        total.add_(left.T.to(total.dtype) @ right.to(total.dtype))
    elif left.dtype is total.dtype:
        total.addmm_(left.T, right)
    else:
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)


@dataclass(frozen=True, slots=True)
class LinearGradient:
    """The weight gradient of a linear layer."""

    output_gradient: Tensor
    """[..., Out]."""
    inputs: Tensor
    """[..., In]."""

    def add_to(self, total: Tensor) -> None:
        """Add it to `total` [Out, In]."""
        add_product(total, self.output_gradient.flatten(0, -2), self.inputs.flatten(0, -2))


@dataclass(frozen=True, slots=True)
class SumOfGradients:
    """A gradient that comes in parts, each made when the one before has been added."""

    parts: Iterator[WeightGradient]
    """The parts; they can be drawn once."""

    def add_to(self, total: Tensor) -> None:
        """Add all of them to `total`."""
        for each in self.parts:
            each.add_to(total)


@dataclass(frozen=True, slots=True)
class SummedGradient:
    """A gradient that is computed already, in parts."""

    gradient: Tensor
    """Of the weight's shape, float32."""

    def add_to(self, total: Tensor) -> None:
        """Add it to `total`."""
        total.add_(self.gradient)
