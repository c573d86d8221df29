"""How keys and values are made from the latents that ranks exchange which share a micro-batch.

A latent is the normed compressed key-value, with the rotated rotary key behind it, which all heads share.

Shapes: K latents, H heads, L width of the compressed key-value, R of the rotary key, N of the rest of a key,
V of a value, O = H (N + V).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.megatron.weight_gradient import add_product


@dataclass(frozen=True)
class LatentKeys:
    """Multi-head latent attention's up-projection of keys and values; see `KeysAndValues`."""

    num_heads: int
    compressed_size: int
    """L."""
    key_size: int
    """N, of a key without its rotary part."""
    value_size: int
    """V."""

    def make(self, latents: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Key [K, H, N + R] and value [K, H, V] of latents [K, L + R]; weight [O, L]."""
        compressed, rotary = latents.tensor_split([self.compressed_size], dim=-1)
        key_value = (compressed @ weight.T).unflatten(-1, (self.num_heads, self.key_size + self.value_size))
        key, value = key_value.tensor_split([self.key_size], dim=-1)
        rotary = rotary.unsqueeze(1).expand(-1, self.num_heads, -1)
        return torch.cat((key, rotary), dim=-1), value.contiguous()

    def backward(
        self, of_key: Tensor, of_value: Tensor, latents: Tensor, weight: Tensor, of_weight: Tensor
    ) -> Tensor:
        """Gradient of latents [K, L + R]; that of the weight is added to `of_weight` [O, L] float32."""
        of_key, of_rotary = of_key.tensor_split([self.key_size], dim=-1)
        of_key_value = torch.cat((of_key, of_value), dim=-1).flatten(1)
        add_product(of_weight, of_key_value, latents[:, : self.compressed_size])
        return torch.cat((of_key_value @ weight, of_rotary.sum(1)), dim=-1)
