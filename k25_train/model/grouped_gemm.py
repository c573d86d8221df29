"""Matrix products of rows in groups, each with a matrix of its own: an expert's tokens with its weights.

| on | forward, and gradients of rows | gradients of matrices, added to float32 |
|---|---|---|
| CUDA in bfloat16 with Transformer Engine | `general_grouped_gemm`: cuBLAS on several streams | the same |
| CUDA in bfloat16 without | `F.grouped_mm`: one CUTLASS kernel | cuBLAS (`addmm`), expert by expert |
| CUDA in float32 | `F.grouped_mm`: its fallback, expert by expert | cuBLAS (`addmm`), expert by expert |
| CPU | `F.grouped_mm` | a product in float32, expert by expert |

`F.grouped_mm` is reported to be no faster than a loop over cuBLAS at sizes like ours (pytorch issue 163425),
and cannot write float32 from bfloat16 operands (torch 2.13). Transformer Engine would multiply float32 in
TF32.

Shapes: T rows of all groups, E groups, In and Out the width of a matrix.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k25_train.errors import ConfigError
from parallel.megatron.weight_gradient import add_product
from parallel.megatron.wgrad import WeightGradients


class RowGroups(NamedTuple):
    """Which rows belong to which group."""

    counts: Tensor
    """[E] integers, rows of each group, on the host where dispatchers have them."""
    on_device: tuple[Tensor, ...]
    """What kernels read of it on the device; saved for the backward pass."""

    def split(self, rows: Tensor) -> list[Tensor]:
        """Views of the rows [T, any] of each group. Waits for the device if the counts are there."""
        return [*rows.split(self.counts.tolist())]


class GroupedGemm(ABC):
    """The products of a grouped linear layer. None waits for the device if counts are on the host, where
    dispatchers have them: they need a copy there themselves."""

    @abstractmethod
    def groups(self, counts: Tensor, device: torch.device) -> RowGroups:
        """Groups of so many rows each, [E] integers, of rows on this device."""

    @abstractmethod
    def outputs(self, rows: Tensor, weights: Tensor, groups: RowGroups) -> Tensor:
        """rows [T, In], grouped, times weights [E, Out, In] transposed: [T, Out]."""

    @abstractmethod
    def row_gradients(self, gradient: Tensor, weights: Tensor, groups: RowGroups) -> Tensor:
        """gradient [T, Out] of the outputs times weights [E, Out, In]: [T, In]."""

    @abstractmethod
    def add_weight_gradients(self, total: Tensor, gradient: Tensor, rows: Tensor, groups: RowGroups) -> None:
        """total [E, Out, In] float32 += gradient [T, Out] transposed, times rows [T, In], group by group."""


class TorchGroupedGemm(GroupedGemm):
    """torch's kernels, on any device."""

    def groups(self, counts: Tensor, device: torch.device) -> RowGroups:
        ends = counts.cumsum(0).to(torch.int32)
        if ends.device != device:
            # From pinned memory a copy does not block; torch keeps that memory until the copy is complete.
            ends = ends.pin_memory().to(device, non_blocking=True)
        return RowGroups(counts, (ends,))

    def outputs(self, rows: Tensor, weights: Tensor, groups: RowGroups) -> Tensor:
        return F.grouped_mm(rows, weights.transpose(1, 2), offs=groups.on_device[0])

    def row_gradients(self, gradient: Tensor, weights: Tensor, groups: RowGroups) -> Tensor:
        return F.grouped_mm(gradient, weights, offs=groups.on_device[0])

    def add_weight_gradients(self, total: Tensor, gradient: Tensor, rows: Tensor, groups: RowGroups) -> None:
        parts = zip(total, groups.split(gradient), groups.split(rows), strict=True)
        for total_of_group, gradient_of_group, rows_of_group in parts:
            if len(rows_of_group):
                add_product(total_of_group, gradient_of_group, rows_of_group)


class TransformerEngineGroupedGemm(GroupedGemm):
    """Transformer Engine's grouped products, which take the groups from the host, and memory as contiguous.

    Its layouts are column-major: "TN" is B·Aᵀ, "NN" is B·A, "NT" is Bᵀ·A, in that order of operands.
    """

    def __init__(self) -> None:
        self._run = _general_grouped_gemm()

    def groups(self, counts: Tensor, device: torch.device) -> RowGroups:
        return RowGroups(counts, ())

    def outputs(self, rows: Tensor, weights: Tensor, groups: RowGroups) -> Tensor:
        output = rows.new_empty(len(rows), weights.shape[1])
        self._into_rows(output, weights, rows, groups, layout="TN", grad=False)
        return output

    def row_gradients(self, gradient: Tensor, weights: Tensor, groups: RowGroups) -> Tensor:
        output = gradient.new_empty(len(gradient), weights.shape[2])
        self._into_rows(output, weights, gradient, groups, layout="NN", grad=True)
        return output

    def add_weight_gradients(self, total: Tensor, gradient: Tensor, rows: Tensor, groups: RowGroups) -> None:
        self._multiply(
            groups.split(rows.contiguous()), groups.split(gradient.contiguous()), [*total], groups,
            layout="NT", grad=True, accumulate=True, single_output=False,
        )  # fmt: skip

    def _into_rows(
        self, output: Tensor, weights: Tensor, rows: Tensor, groups: RowGroups, **options: Any
    ) -> None:
        split = groups.split(rows.contiguous())
        self._multiply([*weights], split, [output], groups, accumulate=False, single_output=True, **options)

    def _multiply(
        self,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        out: Sequence[Tensor],
        groups: RowGroups,
        **options: Any,
    ) -> None:
        self._run(
            A=a,
            B=b,
            out=out,
            quantization_params=[None] * len(a),
            out_dtype=out[0].dtype,
            m_splits=groups.counts.tolist(),
            **options,
        )


_ARGUMENTS = (
    "A", "B", "out", "quantization_params", "out_dtype", "layout", "m_splits", "grad", "accumulate",
    "single_output",
)  # fmt: skip


def _general_grouped_gemm() -> Callable[..., Any]:
    """Transformer Engine's function of this name; ConfigError unless it takes the arguments given here.

    It does from 2.11 to 2.20 (`transformer_engine/pytorch/cpp_extensions/gemm.py`); before, it wanted its
    workspaces and had no `quantization_params`. It is not part of the documented interface.
    """
    import transformer_engine
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm

    parameters = inspect.signature(general_grouped_gemm).parameters
    if missing := [name for name in _ARGUMENTS if name not in parameters]:
        raise ConfigError(
            f"train.transformer_engine=true, but general_grouped_gemm of Transformer Engine "
            f"{transformer_engine.__version__} does not take {', '.join(missing)}: install the version that "
            "setup.py names, or set train.transformer_engine=false"
        )
    return general_grouped_gemm


def grouped_gemm(*, transformer_engine: bool, dtype: torch.dtype) -> GroupedGemm:
    """The kernels for weights of this type, with or without Transformer Engine."""
    if transformer_engine and dtype is torch.bfloat16:
        return TransformerEngineGroupedGemm()
    return TorchGroupedGemm()


@dataclass(frozen=True, slots=True)
class _GroupedGradient:
    gemm: GroupedGemm
    output_gradient: Tensor
    rows: Tensor
    groups: RowGroups

    def add_to(self, total: Tensor) -> None:
        if len(self.rows):
            self.gemm.add_weight_gradients(total, self.output_gradient, self.rows, self.groups)


class _GroupedLinear(torch.autograd.Function):
    """Rows times their group's matrix; the gradient of the matrices goes to a `WeightGradients`.

    `computed` is what is multiplied with; its gradient is taken for that of `weights`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: nn.Parameter,
        computed: Tensor,
        groups: RowGroups,
        gemm: GroupedGemm,
        wgrads: WeightGradients,
    ) -> Tensor:
        ctx.save_for_backward(rows, computed, *groups.on_device)
        # Saved tensors come back without Python attributes, such as `main_grad`, where hooks pack them.
        ctx.weights, ctx.counts, ctx.gemm, ctx.wgrads = weights, groups.counts, gemm, wgrads
        # Kernels need not take nothing.
        return gemm.outputs(rows, computed, groups) if len(rows) else rows.new_empty(0, weights.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, computed, *on_device = ctx.saved_tensors
        groups = RowGroups(ctx.counts, tuple(on_device))
        gradient, of_rows, of_weights = gradients[0].contiguous(), None, None
        if ctx.needs_input_grad[0]:
            of_rows = (
                ctx.gemm.row_gradients(gradient, computed, groups) if len(rows) else torch.zeros_like(rows)
            )
        if ctx.needs_input_grad[1]:
            of_weights = ctx.wgrads.add(ctx.weights, _GroupedGradient(ctx.gemm, gradient, rows, groups))
        return of_rows, of_weights, None, None, None, None


def grouped_linear(
    rows: Tensor,
    weights: nn.Parameter,
    groups: RowGroups,
    gemm: GroupedGemm,
    wgrads: WeightGradients,
    *,
    computed: Tensor,
) -> Tensor:
    """rows [T, In], grouped, times `computed` [E, Out, In]: [T, Out].

    `computed` is the parameter `weights`, or what stands for it; the gradient, straight through to `weights`,
    goes to `wgrads`.

    A group may be empty, and there may be no rows at all: its matrix then gets no gradient, but `wgrads` is
    told all the same.
    """
    return _GroupedLinear.apply(rows, weights, computed.detach(), groups, gemm, wgrads)
