"""MoonViT-3D, the vision tower of Kimi K2.5, as plain torch that knows no ranks (K2.5 report, section 4.1).

An *item* is an image (t = 1) or a video chunk of up to `pos_emb_time` frames, at its native resolution: a
grid of t·h·w patches, patches in (t, h, w) order. A batch is the patches of all its items one after
another; attention is bidirectional inside an item and never crosses from one item to the next. A batch can
also be one *part* of an item, some of its rows, if the others are encoded elsewhere at the same time.

Shapes in comments: P patches of all items, N heads, D head dim, C tower width, V vision tokens (h/2·w/2 an
item).

Parameter names are those of the released checkpoint's `vision_tower.`; `patch_embed.proj.weight` is kept as
the [C, 3·14·14] matrix that the checkpoint stores as a [C, 3, 14, 14] convolution.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k25_train.config.model import VisionConfig

Grid = tuple[int, int, int]
"""(t, h, w) of an item, in patches."""
Layer = Callable[[Tensor], Tensor]
"""A share of the forward pass over certain items."""

NUM_CHANNELS = 3
TEMPORAL_BASE = 10000.0
"""Base of the fixed sin|cos frame table; not configurable in the released modelling code either."""


class ItemPart(Protocol):
    """Rows of an item, over all frames, whose other rows are encoded elsewhere at the same time."""

    @property
    def row(self) -> int:
        """First row of patches."""

    @property
    def num_rows(self) -> int:
        """Rows of patches, whole squares of `merge_size`."""

    def gather(self, own: Tensor) -> Tensor:
        """[p, ...] of these rows' patches -> [t·h·w, ...] of the whole item's, in whatever order.

        Called once a layer, for keys and values together; sends gradients back to where rows came from.
        """


class MoonViT3D(nn.Module):
    """Patches of images and video chunks in, 2x2-merged features out."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        self.vision = vision
        self.patch_embed = PatchEmbed(vision)
        self.encoder = Encoder(vision)

    def forward(self, pixels: Tensor, grid_thw: Sequence[Grid], part: ItemPart | None = None) -> Tensor:
        """Encode the items of a batch; no item at all is legal and gives every parameter a zero gradient.

        Args:
            pixels: [P, 3·patch_size²] normalised patches, channel-major; cast to the weights' dtype.
            grid_thw: one (t, h, w) an item, in the order of `pixels`.
            part: these rows of the one item of `grid_thw` instead, of which alone are `pixels`.

        Returns:
            [V, merge_size², C] features in the weights' dtype: frames averaged, 2x2 neighbours side by side
            in row order, items in the order of `grid_thw`.

        Raises:
            ValueError: a grid or part breaks a rule of the tower, or they do not add up to P; names the item.
        """
        hidden = pixels
        for layer in self.layers(pixels, grid_thw, part):
            hidden = layer(hidden)
        return hidden

    def layers(self, pixels: Tensor, grid_thw: Sequence[Grid], part: ItemPart | None = None) -> list[Layer]:
        """What `forward` does, one function a transformer block: the first one takes `pixels`, each of the
        others what the one before it returns. Raises as `forward` does."""
        if part is None:
            check_grids(grid_thw, pixels.shape[0], self.vision)
            items = pack_items(grid_thw)
        else:
            items = pack_part(grid_thw, part)
            check_part(items.runs[0], pixels.shape[0], self.vision)
        layers = self.encoder.layers(items, pixels.device)
        layers[0] = chain(functools.partial(self._embed, items=items), layers[0])
        layers[-1] = chain(layers[-1], functools.partial(self._merge, items=items))
        return layers

    def _embed(self, pixels: Tensor, items: PackedItems) -> Tensor:
        """[P, 3·patch_size²] as given -> [P, C] in the tower's order."""
        if items.patch_order is not None:
            pixels = pixels.index_select(0, items.patch_order.to(pixels.device))
        return self.patch_embed(pixels, items)

    def _merge(self, hidden: Tensor, items: PackedItems) -> Tensor:
        """[P, C] in the tower's order -> [V, merge_size², C] in the given one."""
        features = pool_and_merge(self.encoder.final_layernorm(hidden), items, self.vision.merge_size)
        if items.patch_order is None:
            return features
        return features.index_select(0, items.feature_order(self.vision.merge_size).to(features.device))


def chain(first: Layer, second: Layer) -> Layer:
    """One after the other."""
    return lambda hidden: second(first(hidden))


class PatchEmbed(nn.Module):
    """Linear patch embedding plus learned spatial and fixed temporal positions."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(NUM_CHANNELS * vision.patch_size**2, vision.hidden_size)
        self.pos_emb = PositionEmbedding(vision)

    def forward(self, pixels: Tensor, items: PackedItems) -> Tensor:
        """[P, 3·patch_size²] -> [P, C]."""
        hidden = self.proj(pixels.to(self.proj.weight.dtype))
        return hidden + self.pos_emb(items).to(hidden.dtype)


class PositionEmbedding(nn.Module):
    """A learned height x width table resampled to each grid; over frames a fixed sin|cos table when t > 1."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(vision.pos_emb_height, vision.pos_emb_width, vision.hidden_size)
        )
        nn.init.normal_(self.weight)

    def forward(self, items: PackedItems) -> Tensor:
        """Positions [P, C] of all patches, float32."""
        # Without items an empty slice keeps the table in the graph, so that its gradient is zero and not
        # None.
        parts = [self._run(run) for run in items.runs] or [self.weight.flatten(0, 1)[:0].float()]
        return torch.cat(parts)

    def _run(self, run: GridRun) -> Tensor:
        height, width, channels = self.weight.shape
        device = self.weight.device
        # Bicubic resampling is separable: two small matrix products replace F.interpolate and its transposes.
        to_rows = bicubic_matrix(height, run.h, device)[run.rows.start : run.rows.stop]
        rows = to_rows @ self.weight.float().flatten(1)
        spatial = bicubic_matrix(width, run.w, device) @ rows.view(len(run.rows), width, channels)
        frames = spatial.view(1, len(run.rows) * run.w, channels)
        if run.t > 1:
            frames = frames + temporal_table(run.t, channels, device)[:, None]
        return frames.expand(run.num_items, -1, -1, -1).reshape(-1, channels)


class Encoder(nn.Module):
    """The transformer blocks and their final norm."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        self.vision = vision
        self.blocks = nn.ModuleList(Block(vision) for _ in range(vision.num_layers))
        self.final_layernorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)

    def layers(self, items: PackedItems, device: torch.device) -> list[Layer]:
        """The blocks [P, C] -> [P, C] for these items; the final norm comes after."""
        rotations = rope_rotations(items, self.vision, device)
        return [functools.partial(block, rotations=rotations, items=items) for block in self.blocks]


class Block(nn.Module):
    """Pre-norm attention and MLP, all projections with bias."""

    def __init__(self, vision: VisionConfig) -> None:
        super().__init__()
        width = vision.hidden_size
        self.num_heads = vision.num_attention_heads
        self.norm0 = nn.LayerNorm(width, eps=vision.layer_norm_eps)
        self.norm1 = nn.LayerNorm(width, eps=vision.layer_norm_eps)
        self.wqkv = nn.Linear(width, 3 * width)
        self.wo = nn.Linear(width, width)
        self.mlp = Mlp(width, vision.ffn_hidden_size)

    def forward(self, hidden: Tensor, rotations: Tensor, items: PackedItems) -> Tensor:
        """[P, C] -> [P, C]; `rotations` is [P, D/2] complex64."""
        qkv = self.wqkv(self.norm0(hidden)).unflatten(-1, (3, self.num_heads, -1))
        query_key = rotate(qkv[:, :2], rotations)
        attended = packed_attention(query_key[:, 0], query_key[:, 1], qkv[:, 2], items)
        hidden = hidden + self.wo(attended.flatten(1))
        return hidden + self.mlp(self.norm1(hidden))


class Mlp(nn.Module):
    """Linear, tanh-approximated GELU, linear."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.fc0 = nn.Linear(hidden_size, ffn_hidden_size)
        self.fc1 = nn.Linear(ffn_hidden_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[P, C] -> [P, C]."""
        return self.fc1(F.gelu(self.fc0(hidden), approximate="tanh"))


@dataclass(frozen=True, slots=True)
class GridRun:
    """Consecutive items of one and the same grid."""

    t: int
    h: int
    w: int
    num_items: int
    rows: range
    """Rows of patches that are encoded: all, unless it is a part of one item."""

    @property
    def length(self) -> int:
        """Encoded patches of one item."""
        return self.t * len(self.rows) * self.w


@dataclass(frozen=True, slots=True)
class PackedItems:
    """The tower's own order of a batch: sorted by length and grid, so that equal items are neighbours.

    Every step then treats equal items as one batched view instead of gathering or looping over items: a
    hundred icons of one size cost one attention call a layer.
    """

    grids: tuple[Grid, ...]
    """The grids as given."""
    item_order: tuple[int, ...]
    """Item indices in the tower's order."""
    runs: tuple[GridRun, ...]
    """Equal grids, in the tower's order."""
    segments: tuple[tuple[int, int], ...]
    """(length in patches, number of items) of equal lengths, in the tower's order."""
    patch_order: Tensor | None
    """[P] int64 on CPU, the given patches in the tower's order; None where the orders agree."""
    gather: Callable[[Tensor], Tensor] | None = None
    """`ItemPart.gather` if the batch is a part of an item."""

    def feature_order(self, merge_size: int) -> Tensor:
        """[V] int64 on CPU: for each token in the given order of items, its place in the tower's order."""
        tower_order = gather_order([h * w // merge_size**2 for _, h, w in self.grids], self.item_order)
        return torch.argsort(tower_order)


def pack_items(grid_thw: Sequence[Grid]) -> PackedItems:
    """Choose the tower's order of items; pure."""
    grids = tuple((int(t), int(h), int(w)) for t, h, w in grid_thw)
    lengths = [t * h * w for t, h, w in grids]
    item_order = tuple(sorted(range(len(grids)), key=lambda item: (lengths[item], grids[item])))
    runs = tuple(
        GridRun(*grid, num_items=len(list(group)), rows=range(grid[1]))
        for grid, group in itertools.groupby(grids[item] for item in item_order)
    )
    segments = tuple(
        (length, sum(run.num_items for run in group))
        for length, group in itertools.groupby(runs, key=lambda run: run.length)
    )
    in_order = item_order == tuple(range(len(grids)))
    patch_order = None if in_order else gather_order(lengths, item_order)
    return PackedItems(
        grids=grids, item_order=item_order, runs=runs, segments=segments, patch_order=patch_order
    )


def pack_part(grid_thw: Sequence[Grid], part: ItemPart) -> PackedItems:
    """A part of one item as a batch; pure. Raises ValueError if there are more items."""
    if len(grid_thw) != 1:
        raise ValueError(f"{len(grid_thw)} grids come with a part, which is of one item: encode it by itself")
    run = GridRun(*grid_thw[0], num_items=1, rows=range(part.row, part.row + part.num_rows))
    return PackedItems(
        grids=tuple(grid_thw),
        item_order=(0,),
        runs=(run,),
        segments=((run.length, 1),),
        patch_order=None,
        gather=part.gather,
    )


def gather_order(lengths: Sequence[int], item_order: Sequence[int]) -> Tensor:
    """[sum(lengths)] int64: the rows of items of these lengths when the items stand in `item_order`."""
    starts = [0, *itertools.accumulate(lengths)]
    return torch.cat([torch.arange(starts[item], starts[item + 1]) for item in item_order])


def check_grids(grid_thw: Sequence[Grid], num_patches: int, vision: VisionConfig) -> None:
    """Raise ValueError for a grid that the tower cannot encode, naming item, value and rule."""
    for item, grid in enumerate(grid_thw):
        t, h, w = grid
        if not 1 <= t <= vision.pos_emb_time:
            raise ValueError(
                f"item {item}: grid {tuple(grid)} has t={t} frames; the temporal table holds 1 to "
                f"pos_emb_time={vision.pos_emb_time}: cut a longer video into chunks"
            )
        for name, size in (("h", h), ("w", w)):
            if size < 1 or size % vision.merge_size:
                raise ValueError(
                    f"item {item}: grid {tuple(grid)} has {name}={size}; it must be a positive multiple of "
                    f"merge_size={vision.merge_size}: pad the image"
                )
            if size > vision.rope_max_grid:
                raise ValueError(
                    f"item {item}: grid {tuple(grid)} has {name}={size}; positions end at "
                    f"rope_max_grid={vision.rope_max_grid}: shrink the image"
                )
    expected = sum(t * h * w for t, h, w in grid_thw)
    if expected != num_patches:
        raise ValueError(
            f"{len(grid_thw)} items: their grids hold {expected} patches, but pixels has {num_patches} rows"
        )


def check_part(run: GridRun, num_patches: int, vision: VisionConfig) -> None:
    """Raise ValueError for a part of an item that the tower cannot encode, naming value and rule."""
    grid, rows = (run.t, run.h, run.w), run.rows
    check_grids([grid], math.prod(grid), vision)
    between_squares = rows.start % vision.merge_size == rows.stop % vision.merge_size == 0
    if not 0 <= rows.start < rows.stop <= run.h or not between_squares or run.length != num_patches:
        raise ValueError(
            f"a part of grid {grid} is rows {rows.start} to {rows.stop}, with {num_patches} patches; it must "
            f"be whole squares of merge_size={vision.merge_size} within {run.h} rows, and all their patches: "
            "cut pixels and grid at the same rows"
        )


def fixed_table[B: Callable[..., Tensor]](build: B) -> B:
    """Cache a constant table, of at most a few hundred KiB each, per arguments.

    Not buffers: a module's `.to(bfloat16)` would round them, and a module built on the meta device would
    lose them. Built outside inference mode, so that a table first needed by an evaluation can serve
    training after it.
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
    return resampled[0, :, :, 0].T.contiguous().to(device)


@fixed_table
def temporal_table(num_frames: int, channels: int, device: torch.device) -> Tensor:
    """[num_frames, channels] float32: sines of all frequencies, then cosines."""
    frequencies = TEMPORAL_BASE ** -(torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    angles = torch.outer(torch.arange(num_frames, dtype=torch.float32), frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(device)


@fixed_table
def axis_rotations(max_grid: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """[max_grid, head_dim/4] complex64: the rotation of each frequency at each position along one axis."""
    frequencies = theta ** -(torch.arange(0, head_dim, 4, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(max_grid, dtype=torch.float32), frequencies)
    return torch.polar(torch.ones_like(angles), angles).to(device)


def rope_rotations(items: PackedItems, vision: VisionConfig, device: torch.device) -> Tensor:
    """[P, D/2] complex64: even pairs turn with x (the column), odd pairs with y, alike in every frame."""
    head_dim = vision.hidden_size // vision.num_attention_heads
    axis = axis_rotations(vision.rope_max_grid, head_dim, vision.rope_theta, device)
    parts = [axis.new_empty(0, head_dim // 2)]
    for run in items.runs:
        by_x = axis[: run.w].expand(len(run.rows), -1, -1)
        by_y = axis[run.rows.start : run.rows.stop, None].expand(-1, run.w, -1)
        grid = torch.stack([by_x, by_y], dim=-1).view(len(run.rows) * run.w, head_dim // 2)
        parts.append(grid.repeat(run.num_items * run.t, 1))
    return torch.cat(parts)


def rotate(vectors: Tensor, rotations: Tensor) -> Tensor:
    """Turn the interleaved pairs of [P, 2, N, D] vectors by [P, D/2] rotations in float32; same dtype out."""
    pairs = torch.view_as_complex(vectors.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations[:, None, None]).flatten(-2).to(vectors.dtype)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, items: PackedItems) -> Tensor:
    """Bidirectional attention inside each item; all [P, N, D]. Items of one length share one batched call.

    A part's queries also attend to the keys and values of the item's other parts.
    """
    if items.gather is not None:
        key, value = items.gather(torch.stack([key, value], dim=1)).unbind(1)
        return attention(1, query, key, value)
    if not items.segments:
        return value
    sizes = [length * num_items for length, num_items in items.segments]
    outputs = [
        attention(num_items, *qkv)
        for (_, num_items), *qkv in zip(
            items.segments, query.split(sizes), key.split(sizes), value.split(sizes), strict=True
        )
    ]
    return torch.cat(outputs)


def attention(num_items: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of items of one length, or of a part: [P, N, D], and [K, N, D] keys, values -> [P, N, D]."""
    heads_first = (each.unflatten(0, (num_items, -1)).transpose(1, 2) for each in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2).flatten(0, 1)


def pool_and_merge(hidden: Tensor, items: PackedItems, merge_size: int) -> Tensor:
    """[P, C] -> [V, merge_size², C]: mean over an item's frames, then neighbours side by side, row by row."""
    channels = hidden.shape[-1]
    parts = [hidden[:0].view(0, merge_size**2, channels)]
    for run, rows in zip(
        items.runs, hidden.split([run.length * run.num_items for run in items.runs]), strict=True
    ):
        shape = (
            run.num_items,
            run.t,
            len(run.rows) // merge_size,
            merge_size,
            run.w // merge_size,
            merge_size,
            channels,
        )
        merged = rows.view(shape).mean(dim=1).transpose(2, 3)
        parts.append(merged.reshape(-1, merge_size**2, channels))
    return torch.cat(parts)
