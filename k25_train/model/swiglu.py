"""SwiGLU, between the up- and down-projection of every feed-forward network."""

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from parallel.activations.annotate import named, recomputed


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2F], gates first -> [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def weighted_swiglu(gate_up: Tensor, weights: Tensor) -> Tensor:
    """[T, 2F], gates first -> [T, F], each row times its weight in [T]."""
    return swiglu(gate_up) * weights.unsqueeze(-1).to(gate_up.dtype)


class SwiGLU(nn.Module):
    """SwiGLU whose input is saved as `<part>.swiglu_input` and whose output as `<part>.down_input`."""

    def __init__(self, part: str, *, config: TransformerConfig) -> None:
        super().__init__()
        self.part = part

    def forward(self, gate_up: Tensor) -> Tensor:
        """[T, 1, 2F] -> [T, 1, F]."""
        return recomputed(f"{self.part}.down_input", swiglu, named(f"{self.part}.swiglu_input", gate_up))
