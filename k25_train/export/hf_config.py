"""The JSON files of an exported folder that say what the model is; its readers build it from them alone.

Two vocabularies are written side by side, with equal values. The release's config.json is in the words of its
own model code, which SGLang reads; transformers renamed half of them for its `kimi_k25`, which vLLM reads as
well, and takes defaults of the real size for what it does not find. Found in transformers 5.23.0
(`models/kimi_k25/configuration_kimi_k25.py`), vLLM 0.32.0 (`model_executor/models/kimi_k25.py`) and SGLang
0.5 (`srt/configs/kimi_k25.py`):

| key | without it |
|---|---|
| `architectures: [KimiK25ForConditionalGeneration]` | vLLM finds no model (transformers writes `Kimi_K25…`) |
| `text_config.topk_method`, `scoring_func` | vLLM has no expert bias, or scores by softmax without a word |
| `tie_word_embeddings: false` | transformers ties the output head: its default for `kimi_k25` is true |
| `use_unified_vision_chunk`, `video_placeholder` | vLLM accepts no image |
| `vision_config.hidden_size` and others next to `vt_hidden_size` | a smaller tower gets the release's size |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from k25_train.config.model import ModelConfig, RopeConfig
from k25_train.errors import CheckpointError

if TYPE_CHECKING:
    from k25_train.data.tokenizer import Tokenizer

ARCHITECTURE = "KimiK25ForConditionalGeneration"
VIDEO_PLACEHOLDER = "<|kimi_k25_video_placeholder|>"
FIXED = {
    "latent_norm_eps": 1e-6,
    "vision.layer_norm_eps": 1e-5,
    "vision.rope_theta": 10000.0,
    "vision.merge_size": 2,
}
"""What the release's model code has as constants, so that no config.json can say otherwise."""


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Ids of the tokens that a model's configuration names."""

    bos: int
    eos: int
    pad: int
    media_begin: int
    media_end: int
    media_pad: int
    turn_end: int | None
    """`<|im_end|>`; None for a vocabulary without conversations."""

    @classmethod
    def of(cls, tokenizer: "Tokenizer") -> "SpecialIds":
        """Those of a vocabulary."""
        return cls(
            bos=tokenizer.bos,
            eos=tokenizer.eos,
            pad=tokenizer.pad,
            media_begin=tokenizer.media_begin,
            media_end=tokenizer.media_end,
            media_pad=tokenizer.media_pad,
            turn_end=tokenizer.chat_ids.get("<|im_end|>"),
        )


def config_json(
    model: ModelConfig, ids: SpecialIds, dtype: str, quantization: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json of the model; `dtype` of plain weights, `quantization` of the experts if they are packed.

    Raises `CheckpointError` for a value that the release's model code has as a constant (`FIXED`).
    """
    _refuse_unsayable(model)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "kimi_k25",
        "dtype": dtype,
        "text_config": _text_config(model, ids, dtype) | _quantized(quantization),
        "vision_config": _vision_config(model),
        "projection_hidden_size": model.vision.hidden_size,
        "projection_layer_norm_eps": model.vision.layer_norm_eps,
        "media_placeholder_token_id": ids.media_pad,
        "image_token_id": ids.media_pad,
        # Images and video chunks share one placeholder, so that of videos is outside the vocabulary.
        "video_token_id": model.vocab_size,
        "vision_start_token_id": ids.media_begin,
        "vision_end_token_id": ids.media_end,
        "use_unified_vision_chunk": True,
        "video_placeholder": VIDEO_PLACEHOLDER,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
        "ignore_index": -100,
        "tie_word_embeddings": False,
    }


def text_config_json(
    model: ModelConfig, ids: SpecialIds, dtype: str, quantization: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json of the language model alone, as Moonlight has it; Kimi-K2's `kimi_k2` is the same to all
    readers but transformers, which does not know it.

    Raises `CheckpointError` as `config_json` does.
    """
    _refuse_unsayable(model)
    return _text_config(model, ids, dtype) | {"model_type": "deepseek_v3"} | _quantized(quantization)


def generation_config_json(model: ModelConfig, ids: SpecialIds) -> dict[str, Any]:
    """generation_config.json: where an answer ends, and how long it may be."""
    ends = [ids.eos] if ids.turn_end is None else [ids.eos, ids.turn_end]
    return {
        "bos_token_id": ids.bos,
        "eos_token_id": ends,
        "pad_token_id": ids.pad,
        "max_length": context_length(model.rope),
    }


def context_length(rope: RopeConfig) -> int:
    """Positions that the rotary embedding was stretched to."""
    return round(rope.original_max_position * rope.scaling_factor)


def _refuse_unsayable(model: ModelConfig) -> None:
    values = {
        "latent_norm_eps": model.latent_norm_eps,
        "vision.layer_norm_eps": model.vision.layer_norm_eps,
        "vision.rope_theta": model.vision.rope_theta,
        "vision.merge_size": float(model.vision.merge_size),
    }
    wrong = [
        f"model.{key}={values[key]:g} (is {fixed:g} there)"
        for key, fixed in FIXED.items()
        if values[key] != fixed
    ]
    if wrong:
        raise CheckpointError(
            f"{', '.join(wrong)}: constants of the released model's code, which no config.json changes\n"
            "  -> a model that is to be exported must be trained with these values"
        )


def _text_config(model: ModelConfig, ids: SpecialIds, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        "dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.dense_ffn_hidden_size,
        "moe_intermediate_size": model.expert_ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_nextn_predict_layers": 0,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_attention_heads,
        "n_shared_experts": model.num_shared_experts,
        "n_routed_experts": model.num_experts,
        "num_experts_per_tok": model.num_experts_per_token,
        "moe_layer_freq": 1,
        "first_k_dense_replace": model.num_dense_layers,
        "routed_scaling_factor": model.routed_scaling_factor,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "aux_loss_alpha": model.balance_loss_coeff,
        "seq_aux": True,
        "kv_lora_rank": model.kv_lora_rank,
        "q_lora_rank": model.q_lora_rank,
        "qk_nope_head_dim": model.qk_nope_head_dim,
        "qk_rope_head_dim": model.qk_rope_head_dim,
        "v_head_dim": model.v_head_dim,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": model.init_std,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope.theta,
        "rope_scaling": _rope_scaling(model.rope),
        "max_position_embeddings": context_length(model.rope),
        "use_cache": True,
        "tie_word_embeddings": False,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
    }


def _quantized(quantization: Mapping[str, Any] | None) -> dict[str, Any]:
    """The release has it in the language model's part, where transformers, vLLM and SGLang look."""
    return {} if quantization is None else {"quantization_config": dict(quantization)}


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.scaling_factor == 1.0:
        return None
    return {
        "type": "yarn",
        "factor": rope.scaling_factor,
        "original_max_position_embeddings": rope.original_max_position,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
    }


def _vision_config(model: ModelConfig) -> dict[str, Any]:
    vision = model.vision
    released = {
        "vt_num_hidden_layers": vision.num_layers,
        "vt_hidden_size": vision.hidden_size,
        "vt_intermediate_size": vision.ffn_hidden_size,
        "vt_num_attention_heads": vision.num_attention_heads,
        "init_pos_emb_height": vision.pos_emb_height,
        "init_pos_emb_width": vision.pos_emb_width,
        "init_pos_emb_time": vision.pos_emb_time,
        "mm_hidden_size": vision.hidden_size,
        "text_hidden_size": model.hidden_size,
        "projector_ln_eps": vision.layer_norm_eps,
        "projector_hidden_act": "gelu",
        "mm_projector_type": "patchmerger",
        "merge_type": "sd2_tpool",
        "pos_emb_type": "divided_fixed",
        "video_attn_type": "spatial_temporal",
    }
    of_transformers = {
        "model_type": "kimi_k25_vision",
        "num_hidden_layers": vision.num_layers,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_attention_heads": vision.num_attention_heads,
        "hidden_act": "gelu_pytorch_tanh",
        "pos_emb_height": vision.pos_emb_height,
        "pos_emb_width": vision.pos_emb_width,
        "pos_emb_time": vision.pos_emb_time,
        "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
    }
    both = {"patch_size": vision.patch_size, "merge_kernel_size": [vision.merge_size, vision.merge_size]}
    return both | released | of_transformers
