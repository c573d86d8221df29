"""FP8 storage by enumeration, and the inputs that its tests share.

Nothing here uses torch's arithmetic or float8: products and quotients are numpy's float32, E4M3 is found in
float64 among all its numbers. A float32's differences to the numbers near it are exact there.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KINDS = ("any bits", "spread", "ties")
"""What `hostile` makes."""


def e4m3_numbers() -> NDArray[np.float64]:
    """Numbers of codes 0x00 to 0x7e (OCP 8-bit floating point, revision 1.0): increasing, up to 448."""
    normal = [
        (1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)
    ]
    return np.array([*(mantissa / 8 * 2.0**-6 for mantissa in range(8)), *normal[:-1]])


NUMBERS = e4m3_numbers()
SMALLEST_AMAX = np.float32(1.75 * 2.0**-108)


def nearest_codes(magnitudes: NDArray[np.float64]) -> NDArray[np.int64]:
    """Codes of the nearest numbers, of two as near the even code; the largest for all above it."""
    below = np.searchsorted(NUMBERS, magnitudes, side="right") - 1
    above = np.minimum(below + 1, len(NUMBERS) - 1)
    to_below, to_above = magnitudes - NUMBERS[below], NUMBERS[above] - magnitudes
    return np.where((to_above < to_below) | ((to_above == to_below) & (above % 2 == 0)), above, below)


def compressed(rows: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes [rows, hidden] and scales [rows, tiles] of float32 or bfloat16 [rows, hidden]."""
    numbers = rows.float().numpy()
    num_rows, hidden = numbers.shape
    codes = np.zeros((num_rows, hidden), np.uint8)
    scales = np.zeros((num_rows, math.ceil(hidden / 128)), np.float32)
    for row, tile in np.ndindex(scales.shape):
        part = numbers[row, 128 * tile : 128 * (tile + 1)]
        finite = np.isfinite(part)
        amax = max(np.abs(part[finite]).max(initial=0), SMALLEST_AMAX)
        quotients = np.abs(np.where(finite, part, 0)) * (np.float32(448) / amax)
        assert quotients.dtype == np.float32
        found = nearest_codes(quotients.astype(np.float64)) + 128 * np.signbit(part)
        codes[row, 128 * tile : 128 * (tile + 1)] = np.where(finite, found, 0x7F)
        scales[row, tile] = amax / np.float32(448)
    return codes, scales


def decompressed(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], dtype: torch.dtype
) -> NDArray[np.float32]:
    """Numbers [rows, hidden], rounded to float32, and then to bfloat16 if that is the dtype."""
    table = np.concatenate([NUMBERS, [np.nan], -NUMBERS, [np.nan]]).astype(np.float32)
    numbers = table[codes] * np.repeat(scales, 128, axis=1)[:, : codes.shape[1]]
    if dtype == torch.bfloat16:
        mantissas, exponents = np.frexp(numbers.astype(np.float64))
        numbers = np.ldexp(np.rint(256 * mantissas), exponents - 8).astype(np.float32)
    return numbers


def hostile(kind: str, seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of one of `KINDS`.

    - any bits: every number, infinity and NaN as likely as its pattern of bits.
    - spread: normally distributed over 20 powers of two around one, which can be any that the dtype has.
    - ties: E4M3 numbers and what is halfway between two, or the next float to it, times one power of two.
    """
    generator = torch.Generator().manual_seed(seed)
    words = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(words)
    if kind == "any bits":
        return torch.randint(info.min, info.max + 1, shape, generator=generator).to(words).view(dtype)
    power = 2.0 ** torch.randint(-150, 122, (), generator=generator).double()
    if kind == "spread":
        below = 2.0 ** (-20 * torch.rand(shape, generator=generator, dtype=torch.float64))
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * below * power).to(dtype)
    grid = torch.from_numpy(np.sort(np.concatenate([NUMBERS, (NUMBERS[1:] + NUMBERS[:-1]) / 2])))
    chosen = grid[torch.randint(len(grid), shape, generator=generator)] * power
    signs = torch.randint(2, shape, generator=generator) * 2 - 1
    nudges = torch.randint(-1, 2, shape, generator=generator).to(words)
    return ((chosen * signs).to(dtype).view(words) + nudges).view(dtype)
