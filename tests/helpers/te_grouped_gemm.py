"""`general_grouped_gemm` of Transformer Engine 2.20 in torch, strict about what its C++ takes for granted.

After `transformer_engine/pytorch/cpp_extensions/gemm.py` and `te_general_grouped_gemm` in
`transformer_engine/pytorch/csrc/extensions/gemm.cpp`: operands are column-major, so that layout "TN" means
B·Aᵀ, "NN" B·A and "NT" Bᵀ·A; memory is read from its first byte on as if contiguous; a product over nothing
is zero, or left out when accumulating; the type of the output counts, not `out_dtype`; and a single output is
filled part by part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """What one call was given."""

    layout: str
    grad: bool
    accumulate: bool
    single_output: bool
    m_splits: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Of the first group's A, B and output."""
    dtypes: tuple[torch.dtype, ...]
    """Of the first group's A, B and output."""
    addresses: tuple[int, ...]
    """Where each output begins."""


calls: list[Call] = []
"""All calls of this process, in order."""


def general_grouped_gemm(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    out: Sequence[Tensor],
    quantization_params: Sequence[Any],
    out_dtype: torch.dtype,
    layout: str = "TN",
    m_splits: Sequence[int] | None = None,
    gelu: bool = False,
    grad: bool = False,
    accumulate: bool = False,
    bias: Any = None,
    use_bias: bool = False,
    use_split_accumulator: bool = False,
    D_dtype: Any = None,
    single_output: bool = False,
) -> tuple[Any, ...]:
    """One product per group, into `out`."""
    # 1. What C++ would not notice.
    assert layout in ("TN", "NN", "NT") and not gelu and not use_bias and D_dtype is None
    assert len(A) == len(B) == len(quantization_params) and set(quantization_params) == {None}
    assert m_splits is not None and all(type(rows) is int for rows in m_splits)
    assert [len(b) for b in B] == [*m_splits], "rows of B"
    assert all(each.is_contiguous() and each.dim() == 2 for each in (*A, *B))
    assert all(each.is_contiguous() for each in out)
    # 2. Outputs of all groups.
    parts = [*out[0].split([*m_splits])] if single_output else [*out]
    assert len(out) == (1 if single_output else len(A)) and len(parts) == len(A)
    calls.append(
        Call(
            layout, grad, accumulate, single_output, tuple(m_splits),
            tuple(tuple(each.shape) for each in (A[0], B[0], parts[0])),
            tuple(each.dtype for each in (A[0], B[0], out[0])),
            tuple(each.data_ptr() for each in out),
        )
    )  # fmt: skip
    # 3. The products: cuBLAS adds up in float32 and rounds once, to the output.
    for a, b, part in zip(A, B, parts, strict=True):
        right, left = a.T if layout[0] == "T" else a, b.T if layout[1] == "T" else b
        assert part.shape == (len(left), right.shape[1]), "output"
        if not (a.numel() and b.numel()):
            part.mul_(accumulate)
        elif accumulate:
            part.add_(left.to(part.dtype) @ right.to(part.dtype))
        else:
            part.copy_(left @ right)
    return out, bias, None


class FusedLinear(torch.autograd.Function):
    """`Linear` with `fuse_wgrad_accumulation`: the weight's gradient is added to `main_grad`, which is read
    when it is needed; autograd, and so data parallelism's hook, gets a tensor of anything."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Any) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.weight = weight
        return F.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        inputs, weight = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        ctx.weight.main_grad.add_(gradient.T.float() @ inputs.flatten(0, -2).float())
        ctx.weight.grad_added_to_main_grad = True
        return gradients[0] @ weight, torch.full_like(weight, torch.nan)


def install() -> None:
    """Let `transformer_engine.pytorch.cpp_extensions` be imported here, with nothing but this function."""
    import sys

    for name in ("", ".pytorch", ".pytorch.cpp_extensions"):
        sys.modules[f"transformer_engine{name}"] = ModuleType(f"transformer_engine{name}")
    sys.modules["transformer_engine"].__version__ = "2.20.0"  # type: ignore[attr-defined]
    functions: Any = sys.modules["transformer_engine.pytorch.cpp_extensions"]
    functions.general_grouped_gemm = general_grouped_gemm
