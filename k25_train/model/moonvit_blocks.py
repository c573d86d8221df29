"""The transformer blocks of MoonViT-3D: bidirectional attention inside each item, and an MLP.

Shapes: P patches of all items, N heads, D head dim, C tower width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k25_train.config.vision import VisionConfig
from k25_train.model.moonvit_attention import Attend, attention_over
from k25_train.model.moonvit_items import PackedItems
from k25_train.model.moonvit_positions import rope_rotations, rotate
from k25_train.plan.memory.kernels import AttentionKernel

Layer = Callable[[Tensor], Tensor]
"""A share of the forward pass over certain items."""


class Encoder(nn.Module):
    """The transformer blocks and their final norm."""

    def __init__(self, vision: VisionConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.vision = vision
        self._kernel = kernel
        self.blocks = nn.ModuleList(Block(vision) for _ in range(vision.num_layers))
        self.final_layernorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)

    def layers(self, items: PackedItems, device: torch.device) -> list[Layer]:
        """The blocks [P, C] -> [P, C] for these items, without the final norm."""
        rotations = rope_rotations(items, self.vision, device)
        attend = attention_over(items, device, self._kernel)
        return [functools.partial(block, rotations=rotations, attend=attend) for block in self.blocks]


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

    def forward(self, hidden: Tensor, rotations: Tensor, attend: Attend) -> Tensor:
        """[P, C] -> [P, C]; `rotations` is [P, D/2] complex64."""
        qkv_P3ND = self.wqkv(self.norm0(hidden)).unflatten(-1, (3, self.num_heads, -1))
        qk_P2ND = rotate(qkv_P3ND[:, :2], rotations)
        attended_PND = attend(qk_P2ND[:, 0], qk_P2ND[:, 1], qkv_P3ND[:, 2])
        hidden = hidden + self.wo(attended_PND.flatten(1))
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
