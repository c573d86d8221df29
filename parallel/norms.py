"""Norms to float32's last digit, whatever the size of the tensor.

On the CPU, torch adds the squares of float32 numbers in one run: a norm of 1M elements is 1e-5 too small, one
of 50M elements 4e-3, by amounts that depend on how a tensor is cut. With float64 sums it first copies the
tensor to float64; block by block, that copy is small. On CUDA, sums are trees, accumulated in the type asked
for: one kernel does it. Meta tensors of a dry run, which may be of any size, are not cut either.

Shapes: B matrices.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 1 << 18
"""Elements of the CPU's blocks: 2 MiB in float64, which stays in its cache."""


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all elements of at least one tensor, a float64 scalar on their device."""
    if tensors[0].is_cpu:
        blocks = (block for tensor in tensors for block in tensor.reshape(-1).split(BLOCK))
        norms = tuple(torch.linalg.vector_norm(block, dtype=torch.float64) for block in blocks)
    else:
        norms = torch._foreach_norm(list(tensors), 2, torch.float64)
    return torch.stack(norms).square().sum()


def frobenius_norms(matrices: Tensor) -> Tensor:
    """The Frobenius norms [B, 1, 1] float64 of `matrices` [B, rows, cols]."""
    if matrices.is_cpu:
        return torch.stack([sum_of_squares([matrix]) for matrix in matrices]).sqrt().view(-1, 1, 1)
    return torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=torch.float64)
