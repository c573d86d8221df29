"""The release's INT4 rule in plain numpy, and weights to try it on."""

import itertools

import numpy as np
import torch
from torch import Tensor

from k25_train.int4 import GROUP_SIZE


def bf16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16, to nearest even, by the bits."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def by_the_rule(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packed int32 [out, in / 8] and scales [out, in / 32] in float32, group by group and code by code."""
    rows, columns = weight.shape
    packed = np.zeros((rows, columns // 8), np.uint32)
    scales = np.zeros((rows, columns // 32), np.float32)
    for row, group in itertools.product(range(rows), range(columns // 32)):
        values = weight[row, 32 * group : 32 * group + 32].astype(np.float32)
        scale = bf16(np.abs(values).max(keepdims=True) / np.float32(7))[0]
        scales[row, group] = scale
        for index, value in enumerate(values):
            code = 0 if scale == 0 else int(np.clip(np.rint(value / scale), -7, 7))
            word = 4 * group + index // 8
            packed[row, word] |= np.uint32((code + 8) << 4 * (index % 8))
    return packed.view(np.int32), scales


def random_weights(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Of very different scales, with groups of zeros and groups with one other weight."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** torch.randint(-6, 4, (*shape[:-1], 1), generator=generator)
    weight = torch.randn(shape, generator=generator) * scales
    weight[..., 0, :GROUP_SIZE] = 0
    weight[..., 1, : GROUP_SIZE - 1] = 0
    return weight.to(dtype)
