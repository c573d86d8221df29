"""The independent Kimi K2.5 of transformers (`kimi_k25`), with random weights in the released checkpoint's
names.

Weights are drawn here, name by name from our listing of the checkpoint, and loaded by transformers' own
conversion (`from_pretrained(state_dict=…)`), which refuses missing, unexpected and misshapen tensors: its
un-fusing of qkv, its RoPE permutation and its stacking of experts are independent of ours.

Where transformers 5.23.0 departs from the released modelling code or cannot be used unchanged:

- `get_image_features` splits by t·h·w/4 although the merger pools time, so it raises for video chunks; and
  the merger concatenates index tensors whose width is t, so items of different t cannot share a call.
  `hf_image_features` therefore calls tower and projector once per item.
- The position table is resampled as a square of `pos_emb_height`, whatever `pos_emb_width` says.
- Rotary pairs of the tower are stored half-split, not interleaved; conversion permutes q and k to match.
- Random tables, norms, biases and expert biases are ours: transformers would start them at constants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from k25_train.config.model import ModelConfig, Quantization, RopeConfig
from k25_train.config.vision import VisionConfig
from k25_train.parameters.released import iterate_tensors

MEDIA_PAD_OFFSET = 2
"""The media placeholder is this many ids before the end of the tiny vocabulary."""


def tiny_model_config(**overrides: Any) -> ModelConfig:
    """The smallest model that has every mechanism: dense and MoE layers, YaRN, and a vision tower."""
    values: dict[str, Any] = {
        "name": "test",
        "num_layers": 3,
        "num_dense_layers": 1,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "num_key_value_heads": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "dense_ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "num_experts": 8,
        "num_experts_per_token": 3,
        "num_shared_experts": 1,
        "routed_scaling_factor": 2.827,
        "balance_loss_coeff": 0.001,
        "expert_bias_update_rate": 0.001,
        "rms_norm_eps": 1e-5,
        "latent_norm_eps": 1e-6,
        "vocab_size": 256,
        "init_std": 0.02,
        "quantization": Quantization.none,
        "rope": RopeConfig(
            theta=50000.0,
            scaling_factor=64.0,
            original_max_position=32,
            beta_fast=32.0,
            beta_slow=1.0,
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
        "vision": tiny_vision_config(),
    }
    return ModelConfig(**values | overrides)


def plain_rope() -> RopeConfig:
    """Rotary positions that nothing stretches."""
    return replace(tiny_model_config().rope, scaling_factor=1.0)


def tiny_vision_config(**overrides: Any) -> VisionConfig:
    """A tower of 3 layers and 4 heads of 12 channels: like the real 72, no power of two."""
    values: dict[str, Any] = {
        "patch_size": 14,
        "num_layers": 3,
        "hidden_size": 48,
        "ffn_hidden_size": 80,
        "num_attention_heads": 4,
        "pos_emb_height": 16,
        "pos_emb_width": 16,
        "pos_emb_time": 4,
        "merge_size": 2,
        "rope_theta": 10000.0,
        "rope_max_grid": 64,
        "layer_norm_eps": 1e-5,
        "image_patch_limit": 1024,
        "side_patch_limit": 64,
        "frame_patch_limit": 256,
        "video_fps": 2.0,
    }
    return VisionConfig(**values | overrides)


def build_hf_reference(
    model: ModelConfig, state: Mapping[str, Tensor] | None = None, attention: str = "eager"
) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """Build transformers' model in float32 and the state dict that it was loaded from.

    Args:
        model: our model config.
        state: weights in the released checkpoint's names; random ones if not given.
        attention: transformers' `attn_implementation`.

    Returns:
        The model in eval mode (it has no dropout, so training works as well), and its weights in the released
        checkpoint's names (`language_model.model.…`, `vision_tower.…`, `mm_projector.…`).
    """
    from transformers import Kimi_K25ForConditionalGeneration

    weights = random_checkpoint(model) if state is None else dict(state)
    hf_model, info = Kimi_K25ForConditionalGeneration.from_pretrained(
        None,
        config=hf_config(model),
        state_dict={name: tensor.clone() for name, tensor in weights.items()},
        dtype=torch.float32,
        attn_implementation=attention,
        experts_implementation="eager",
        output_loading_info=True,
    )
    problems = {key: value for key, value in info.items() if value}
    if problems:
        raise AssertionError(f"transformers did not load the random checkpoint cleanly: {problems}")
    return hf_model.eval(), weights


def hf_config(model: ModelConfig) -> Any:
    """Our model config as transformers' `Kimi_K25Config`."""
    from transformers import Kimi_K25Config

    vision = model.vision
    return Kimi_K25Config(
        text_config={
            "model_type": "deepseek_v3",
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.dense_ffn_hidden_size,
            "moe_intermediate_size": model.expert_ffn_hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.num_attention_heads,
            "n_shared_experts": model.num_shared_experts,
            "n_routed_experts": model.num_experts,
            "routed_scaling_factor": model.routed_scaling_factor,
            "kv_lora_rank": model.kv_lora_rank,
            "q_lora_rank": model.q_lora_rank,
            "qk_rope_head_dim": model.qk_rope_head_dim,
            "v_head_dim": model.v_head_dim,
            "qk_nope_head_dim": model.qk_nope_head_dim,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": model.num_experts_per_token,
            "first_k_dense_replace": model.num_dense_layers,
            "norm_topk_prob": True,
            "max_position_embeddings": int(model.rope.original_max_position * model.rope.scaling_factor),
            "rms_norm_eps": model.rms_norm_eps,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "rope_parameters": _rope_parameters(model.rope),
            "num_nextn_predict_layers": 0,
            "use_cache": False,
        },
        vision_config={
            "patch_size": vision.patch_size,
            "pos_emb_height": vision.pos_emb_height,
            "pos_emb_width": vision.pos_emb_width,
            "pos_emb_time": vision.pos_emb_time,
            "num_attention_heads": vision.num_attention_heads,
            "num_hidden_layers": vision.num_layers,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.ffn_hidden_size,
            "merge_kernel_size": (vision.merge_size, vision.merge_size),
            "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
        },
        projection_hidden_size=vision.hidden_size,
        projection_layer_norm_eps=vision.layer_norm_eps,
        image_token_id=media_pad_id(model),
        # Outside the vocabulary, as in the released config: images and videos share one placeholder.
        video_token_id=model.vocab_size,
        tie_word_embeddings=False,
    )


def _rope_parameters(rope: RopeConfig) -> dict[str, Any]:
    if rope.scaling_factor == 1.0:
        return {"rope_type": "default", "rope_theta": rope.theta}
    return {
        "rope_type": "yarn",
        "rope_theta": rope.theta,
        "factor": rope.scaling_factor,
        "original_max_position_embeddings": rope.original_max_position,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
    }


def media_pad_id(model: ModelConfig) -> int:
    """Token id of one vision token in the tests' inputs."""
    return model.vocab_size - MEDIA_PAD_OFFSET


def hf_image_features(
    hf_model: torch.nn.Module, pixels: Tensor, grid_thw: Sequence[tuple[int, int, int]]
) -> Tensor:
    """transformers' tower and projector: pixels [P, 3·p·p] to embeddings [V, text width], item by item."""
    tower, projector = hf_model.model.vision_tower, hf_model.model.mm_projector
    patch = tower.config.patch_size
    features = []
    for item, grid in zip(pixels.split([math.prod(grid) for grid in grid_thw]), grid_thw, strict=True):
        output = tower(item.view(-1, 3, patch, patch), grid_thw=torch.tensor([grid]))
        features.append(projector(output.pooler_output).squeeze(1))
    return torch.cat(features)


def hf_logits(
    hf_model: torch.nn.Module,
    tokens: Tensor,
    document_lengths: Sequence[int],
    pixels: Tensor | None = None,
    grid_thw: Sequence[tuple[int, int, int]] = (),
) -> Tensor:
    """Logits [T, vocabulary] of packed documents, each run alone, which is what packing has to equal.

    Args:
        hf_model: from `build_hf_reference`.
        tokens: [T] int64; `media_pad_id` marks the places of vision tokens, in the order of the items.
        document_lengths: in tokens, adding up to T.
        pixels: [P, 3·p·p] patches of all items, or None without items.
        grid_thw: one (t, h, w) an item.
    """
    embeddings = hf_model.get_input_embeddings()(tokens)
    if grid_thw:
        features = hf_image_features(hf_model, pixels, grid_thw)
        placeholders = (tokens == hf_model.config.image_token_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(placeholders, features)
    documents = embeddings.split(list(document_lengths))
    outputs = [hf_model.model.language_model(inputs_embeds=document[None]) for document in documents]
    return torch.cat([hf_model.lm_head(output.last_hidden_state[0]) for output in outputs])


def random_checkpoint(model: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random float32 weights in the released checkpoint's names and shapes, none of them constant.

    Matrices keep the scale of their input; norms scatter about 1; biases and expert biases are far from 0.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for tensor in iterate_tensors(model):
        name, shape = tensor.name, tensor.shape
        noise = torch.randn(shape, generator=generator)
        if name.endswith("pos_emb.weight") or name.endswith("embed_tokens.weight"):
            state[name] = noise
        elif "norm" in name and name.endswith(".weight"):
            state[name] = 1.0 + 0.2 * noise
        elif len(shape) == 1:
            state[name] = 0.1 * noise
        else:
            state[name] = noise / math.sqrt(math.prod(shape[1:]))
    return state
