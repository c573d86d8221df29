"""The encoder's two passes over one chunk of items.

The first keeps nothing but the features; the second computes the same again and goes backward. The tower has
no dropout, so both see the same numbers without any state of a random generator.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int, int]
Encoder = Callable[[Tensor, tuple[Grid, ...]], Tensor]
"""From patches [P, 3*p*p] of items and their grids (t, h, w) to features [V, D], both item after item."""


class Chunk(NamedTuple):
    """Items that a rank encodes at once, or a part of one."""

    pixels: Tensor
    """[P, 3*p*p] float32 in host memory, item after item; of a part its own."""
    grid_thw: tuple[Grid, ...]
    """Frames, rows and columns of patches of each item; of a part the whole item's."""


@torch.no_grad()
def encode(encoder: Encoder, chunk: Chunk, device: torch.device) -> Tensor:
    """The features [V, D] of a chunk; no activation outlives the call."""
    return encoder(chunk.pixels.to(device, non_blocking=True), chunk.grid_thw)


def recompute_and_backward(encoder: Encoder, chunk: Chunk, gradient: Tensor) -> None:
    """Encode a chunk again and add to the gradients of the encoder's parameters.

    Args:
        gradient: [V, D] of the loss by the features, on the device.
    """
    with torch.enable_grad():
        features = encoder(chunk.pixels.to(gradient.device, non_blocking=True), chunk.grid_thw)
        features.backward(gradient.to(features.dtype))
