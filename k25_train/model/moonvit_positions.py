"""Patch embedding and positions of MoonViT-3D: tables added to patches, rotations of queries and keys.

Shapes: P patches of all items, X = 3·patch_size² values of a patch, C tower width, N heads, D head dim; the
learned table has H rows and W columns, an item t frames of h rows and w columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k25_train.config.vision import VisionConfig
from k25_train.model.moonvit_items import GridRun, PackedItems
from parallel.host.upload import upload

NUM_CHANNELS = 3
TEMPORAL_BASE = 10000.0
"""Base of the fixed sin|cos frame table; not configurable in the released modelling code either."""


class PatchEmbed(nn.Module):
    """Linear patch embedding plus learned spatial and fixed temporal positions."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(NUM_CHANNELS * vision.patch_size**2, vision.hidden_size)
        self.pos_emb = PositionEmbedding(vision)

    def forward(self, pixels: Tensor, items: PackedItems) -> Tensor:
        """Pixels [P, X], uint8 or normalised already, -> [P, C]."""
        if pixels.dtype is torch.uint8:
            pixels = normalised(pixels)
        hidden_PC = self.proj(pixels.to(self.proj.weight.dtype))
        return hidden_PC + self.pos_emb(items).to(hidden_PC.dtype)


def normalised(pixels: Tensor) -> Tensor:
    """Decoded pixels, uint8, as the tower takes them: (x/255 - 0.5)/0.5 in float32, of the same shape.

    Source: image_mean and image_std of the release's preprocessor_config.json, in the operations of its
    image processor.
    """
    return pixels.to(torch.float32).div_(255).sub_(0.5).div_(0.5)


class PositionEmbedding(nn.Module):
    """A learned table of rows and columns, resampled to each grid; plus a fixed sin|cos table over frames."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(vision.pos_emb_height, vision.pos_emb_width, vision.hidden_size)
        )
        nn.init.normal_(self.weight)

    def forward(self, items: PackedItems) -> Tensor:
        """Positions [P, C] of all patches, float32."""
        # Without items, an empty slice keeps the table in the graph: its gradient is then zero, not None.
        parts = [self._run(run) for run in items.runs] or [self.weight.flatten(0, 1)[:0].float()]
        return torch.cat(parts)

    def _run(self, run: GridRun) -> Tensor:
        """Positions [P, C] of a run's patches, float32."""
        height, width, channels = self.weight.shape
        device = self.weight.device
        # Bicubic resampling is separable: two small matrix products replace F.interpolate and its transposes.
        to_rows_hH = bicubic_matrix(height, run.h, device)[run.rows.start : run.rows.stop]
        rows_hWC = (to_rows_hH @ self.weight.float().flatten(1)).view(len(run.rows), width, channels)
        spatial_hwC = bicubic_matrix(width, run.w, device) @ rows_hWC
        frames_tPC = spatial_hwC.view(1, len(run.rows) * run.w, channels)
        # Images have no temporal position.
        if run.t > 1:
            frames_tPC = frames_tPC + temporal_table(run.t, channels, device)[:, None]
        return frames_tPC.expand(run.num_items, -1, -1, -1).reshape(-1, channels)


def fixed_table[B: Callable[..., Tensor]](build: B) -> B:
    """Cache a constant table of at most a few hundred KiB per combination of arguments.

    Tables are not buffers: a module's `.to(bfloat16)` would round those, and a module built on the meta
    device would lose them. They are built outside inference mode, so that a table that an evaluation needs
    first can serve training later.
    """

    @functools.lru_cache(maxsize=1024)
    @functools.wraps(build)
    def cached(*args: Any, **kwargs: Any) -> Tensor:
        with torch.inference_mode(False), torch.device("cpu"):
            return build(*args, **kwargs)

    return cast(B, cached)


@fixed_table
def bicubic_matrix(table_size: int, size: int, device: torch.device) -> Tensor:
    """[size, table_size] float32 weights that resample one axis as F.interpolate(mode="bicubic") does."""
    unit_rows = torch.eye(table_size).view(1, table_size, table_size, 1)
    resampled = F.interpolate(unit_rows, size=(size, 1), mode="bicubic", align_corners=False)
    return upload(resampled[0, :, :, 0].T.contiguous(), device)


@fixed_table
def temporal_table(num_frames: int, channels: int, device: torch.device) -> Tensor:
    """[num_frames, channels] float32: sines of all frequencies, then cosines."""
    frequencies = TEMPORAL_BASE ** -(torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    angles = torch.outer(torch.arange(num_frames, dtype=torch.float32), frequencies)
    return upload(torch.cat([angles.sin(), angles.cos()], dim=1), device)


@fixed_table
def axis_rotations(max_grid: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """[max_grid, head_dim/4] complex64: the rotation of each frequency at each position along one axis."""
    frequencies = theta ** -(torch.arange(0, head_dim, 4, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(max_grid, dtype=torch.float32), frequencies)
    return upload(torch.polar(torch.ones_like(angles), angles), device)


def rope_rotations(items: PackedItems, vision: VisionConfig, device: torch.device) -> Tensor:
    """[P, D/2] complex64: even pairs turn with x (the column), odd pairs with y; the same in every frame."""
    head_dim = vision.hidden_size // vision.num_attention_heads
    axis = axis_rotations(vision.rope_max_grid, head_dim, vision.rope_theta, device)
    # The empty first entry gives a batch without items its shape.
    parts = [axis.new_empty(0, head_dim // 2)]
    for run in items.runs:
        by_x = axis[: run.w].expand(len(run.rows), -1, -1)
        by_y = axis[run.rows.start : run.rows.stop, None].expand(-1, run.w, -1)
        grid = torch.stack([by_x, by_y], dim=-1).view(len(run.rows) * run.w, head_dim // 2)
        parts.append(grid.repeat(run.num_items * run.t, 1))
    return torch.cat(parts)


def rotate(vectors: Tensor, rotations: Tensor) -> Tensor:
    """Turn the interleaved pairs of [P, 2, N, D] vectors by [P, D/2] rotations, in float32; dtype is kept."""
    pairs = torch.view_as_complex(vectors.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations[:, None, None]).flatten(-2).to(vectors.dtype)
