"""Attention of one token over latents: keys and values are never made.

A head's key is W_k·c and its value W_v·c for a token's latent c, so q·(W_k·c) = (W_kᵀ·q)·c, and the sum of
p·(W_v·c) is W_v times the sum of p·c (DeepSeek-V2, arXiv 2405.04434, section 2.1). transformers makes all
keys and values of the cache again for every token, which is most of a step.

Whole prompts go the usual way, which takes less time for them. transformers' module calls what is registered
here with the latents, since `expand_kv` of a module hands them on as they are.

Shapes: b slots, H heads, n tokens, K keys, R numbers of a latent.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, eager_attention_forward

NAME = "k25_latent_attention"


def use_latent_attention(text_model: Any) -> None:
    """Have transformers' language model attend as this module says."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, latent_attention)
    text_model.config._attn_implementation = NAME
    for module in text_model.modules():
        if isinstance(module, DeepseekV3Attention):
            module.expand_kv = _as_they_are  # type: ignore[method-assign]


def latent_attention(
    module: Any,
    query: Tensor,
    latents: Tensor,
    rotated: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attention in transformers' interface.

    Args:
        module: a `DeepseekV3Attention`.
        query: [b, H, n, nope + rope].
        latents: [b, 1, K, R].
        rotated: [b, 1, K, rope], the part of a key that all heads share.
        attention_mask: [b or 1, 1, n, K], added to the scores.
        scaling: factor of the scores.

    Returns:
        [b, n, H, v], and no weights.
    """
    if query.shape[2] > 1:
        key, value = DeepseekV3Attention.expand_kv(module, latents, rotated)
        output, _ = eager_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **arguments
        )
        return output, None
    nope, heads = module.qk_nope_head_dim, module.num_heads
    weight = module.kv_b_proj.weight.view(heads, nope + module.v_head_dim, -1)
    query, latents, rotated = query.squeeze(2), latents.squeeze(1), rotated.squeeze(1)
    # 1. Scores: the query in the latents' space, and its rotated part.
    of_latents = torch.matmul(query[..., :nope].transpose(0, 1), weight[:, :nope]).transpose(0, 1)
    scores = torch.matmul(of_latents, latents.mT) + torch.matmul(query[..., nope:], rotated.mT)
    shares = torch.softmax(scores * scaling + attention_mask.squeeze(2), dim=-1, dtype=torch.float32)
    # 2. The mean latent of each head, and its value.
    mean = torch.matmul(shares.to(query.dtype), latents)
    values = torch.matmul(mean.transpose(0, 1), weight[:, nope:].mT).transpose(0, 1)
    return values.unsqueeze(1), None


def _as_they_are(kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    return kv_nope, k_rot
