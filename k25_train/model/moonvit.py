"""MoonViT-3D, the vision tower of Kimi K2.5, as plain torch that knows no ranks (K2.5 report, section 4.1).

An *item* is an image (t = 1) or a video chunk of up to `pos_emb_time` frames, at its native resolution: a
grid of t·h·w patches, patches in (t, h, w) order. A batch is the patches of all its items one after
another; attention is bidirectional inside an item and never crosses from one item to the next. A batch can
also be one *part* of an item, some of its rows, if the others are encoded elsewhere at the same time.

    moonvit_items       grids are checked, and items sorted so that equal ones are neighbours
    moonvit_positions   patches are embedded; learned, fixed and rotary positions
    moonvit_attention   attention inside each item
    moonvit_blocks      the transformer blocks
    moonvit             the tower: all of it, and 2x2 merging

Shapes: P patches of all items, X = 3·patch_size² values of a patch, C tower width, V vision tokens
(h/2·w/2 per item), S = merge_size² patches of a token.

Parameter names are those of the released checkpoint's `vision_tower.`; `patch_embed.proj.weight` is kept as
the [C, X] matrix that the checkpoint stores as a [C, 3, 14, 14] convolution.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from k25_train.config.vision import VisionConfig
from k25_train.model.moonvit_blocks import Encoder, Layer
from k25_train.model.moonvit_items import (
    Grid,
    ItemPart,
    PackedItems,
    check_grids,
    check_part,
    pack_items,
    pack_part,
)
from k25_train.model.moonvit_positions import PatchEmbed
from k25_train.plan.memory.kernels import AttentionKernel
from parallel.host.upload import upload


class MoonViT3D(nn.Module):
    """Patches of images and video chunks in, 2x2-merged features out."""

    def __init__(self, vision: VisionConfig, kernel: AttentionKernel = AttentionKernel.cpu) -> None:
        """`kernel` attends (`vision_attention_kernel`)."""
        super().__init__()
        self.vision = vision
        self.patch_embed = PatchEmbed(vision)
        self.encoder = Encoder(vision, kernel)

    def forward(self, pixels: Tensor, grid_thw: Sequence[Grid], part: ItemPart | None = None) -> Tensor:
        """Encode the items of a batch; without items, every parameter still gets a gradient, of zeros.

        Args:
            pixels: [P, X] patches, channel-major: uint8 as decoded, or floats that are normalised already.
            grid_thw: one (t, h, w) per item, in the order of `pixels`.
            part: the rows to encode of the only item in `grid_thw`; `pixels` then holds these rows alone.

        Returns:
            [V, S, C] features in the weights' dtype: frames averaged, 2x2 neighbours side by side in row
            order, items in the order of `grid_thw`.

        Raises:
            ValueError: a grid or part breaks a rule of the tower, or they do not add up to P; names the item.
        """
        hidden = pixels
        for layer in self.layers(pixels, grid_thw, part):
            hidden = layer(hidden)
        return hidden

    def layers(self, pixels: Tensor, grid_thw: Sequence[Grid], part: ItemPart | None = None) -> list[Layer]:
        """What `forward` does, as one function per transformer block: the first takes `pixels`, each of the
        others what the previous one returns. Arguments and errors are those of `forward`."""
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

    def _embed(self, pixels_PX: Tensor, items: PackedItems) -> Tensor:
        """[P, X] in the given order -> [P, C] in the tower's order."""
        if items.patch_order is not None:
            pixels_PX = pixels_PX.index_select(0, upload(items.patch_order, pixels_PX.device))
        return self.patch_embed(pixels_PX, items)

    def _merge(self, hidden_PC: Tensor, items: PackedItems) -> Tensor:
        """[P, C] in the tower's order -> [V, S, C] in the given order."""
        features_VSC = pool_and_merge(self.encoder.final_layernorm(hidden_PC), items, self.vision.merge_size)
        if items.patch_order is None:
            return features_VSC
        order_V = upload(items.feature_order(self.vision.merge_size), features_VSC.device)
        return features_VSC.index_select(0, order_V)


def chain(first: Layer, second: Layer) -> Layer:
    """The function that calls `first` and then `second`."""
    return lambda hidden: second(first(hidden))


def pool_and_merge(hidden_PC: Tensor, items: PackedItems, merge_size: int) -> Tensor:
    """[P, C] -> [V, S, C]: mean over an item's frames, then neighbours side by side, row by row."""
    channels = hidden_PC.shape[-1]
    # The empty first entry gives a batch without items its shape.
    merged_VSC = [hidden_PC[:0].view(0, merge_size**2, channels)]
    lengths = [run.length * run.num_items for run in items.runs]
    for run, run_PC in zip(items.runs, hidden_PC.split(lengths), strict=True):
        num_rows, num_columns = len(run.rows) // merge_size, run.w // merge_size
        by_neighbour = run_PC.view(
            run.num_items, run.t, num_rows, merge_size, num_columns, merge_size, channels
        )
        merged = by_neighbour.mean(dim=1).transpose(2, 3)
        merged_VSC.append(merged.reshape(-1, merge_size**2, channels))
    return torch.cat(merged_VSC)
