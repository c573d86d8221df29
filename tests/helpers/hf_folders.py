"""Hugging Face folders of small random models, written with the libraries' own tools, and what they hold."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from k25_train.config.model import ModelConfig
from k25_train.export.released import to_ours
from tests.helpers.hf_reference import random_checkpoint, tiny_model_config


def small_model(**overrides: Any) -> ModelConfig:
    """The tests' model with two layers, in which every kind of tensor occurs."""
    return tiny_model_config(num_layers=2, num_experts=4, **overrides)


def random_state(model: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Weights in the release's names; the router's bias in float32."""
    state = random_checkpoint(model)
    return {name: each if "e_score" in name else each.to(dtype) for name, each in state.items()}


def ours_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state as training holds it: experts of a layer stacked."""
    ours = to_ours(state)
    stacks: dict[str, list[Tensor]] = {}
    for name, tensor in ours.items():
        before, is_expert, after = name.partition(".mlp.experts.")
        if not is_expert:
            stacks[name] = [tensor]
            continue
        number, _, last = after.partition(".")
        stack = stacks.setdefault(f"{before}.mlp.experts.{last}", [])
        assert len(stack) == int(number), "experts come in order"
        stack.append(tensor)
    return {name: torch.stack(each) if ".mlp.experts." in name else each[0] for name, each in stacks.items()}


def text_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of the language model, with the keys of moonshotai/Kimi-K2-Instruct."""
    yarn = {
        "type": "yarn",
        "factor": model.rope.scaling_factor,
        "original_max_position_embeddings": model.rope.original_max_position,
        "beta_fast": model.rope.beta_fast,
        "beta_slow": model.rope.beta_slow,
        "mscale": model.rope.mscale,
        "mscale_all_dim": model.rope.mscale_all_dim,
    }
    return {
        "model_type": "kimi_k2",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.dense_ffn_hidden_size,
        "moe_intermediate_size": model.expert_ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_attention_heads,
        "n_shared_experts": model.num_shared_experts,
        "n_routed_experts": model.num_experts,
        "num_experts_per_tok": model.num_experts_per_token,
        "routed_scaling_factor": model.routed_scaling_factor,
        "first_k_dense_replace": model.num_dense_layers,
        "kv_lora_rank": model.kv_lora_rank,
        "q_lora_rank": model.q_lora_rank,
        "qk_nope_head_dim": model.qk_nope_head_dim,
        "qk_rope_head_dim": model.qk_rope_head_dim,
        "v_head_dim": model.v_head_dim,
        "rms_norm_eps": model.rms_norm_eps,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "rope_theta": model.rope.theta,
        "rope_scaling": yarn if model.rope.scaling_factor > 1 else None,
    }


def tower_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of the tower, with the keys of moonshotai/MoonViT-SO-400M."""
    vision = model.vision
    return {
        "model_type": "moonvit",
        "patch_size": vision.patch_size,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "init_pos_emb_height": vision.pos_emb_height,
        "init_pos_emb_width": vision.pos_emb_width,
        "merge_kernel_size": [2, 2],
    }


def k25_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of the whole, with the keys of moonshotai/Kimi-K2.5."""
    tower = tower_config(model)
    renamed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision = {f"vt_{key}" if key in renamed else key: value for key, value in tower.items()}
    vision |= {"init_pos_emb_time": model.vision.pos_emb_time, "hidden_size": model.hidden_size}
    return {"model_type": "kimi_k25", "text_config": text_config(model), "vision_config": vision}


def write_folder(
    path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], num_files: int = 2
) -> Path:
    """Write a folder with an index, or with `model.safetensors` alone for one file."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    if num_files == 1:
        save_file({name: each.contiguous() for name, each in state.items()}, path / "model.safetensors")
        return path
    places = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        share = dict(list(state.items())[number::num_files])
        save_file({name: each.contiguous() for name, each in share.items()}, path / file)
        places |= dict.fromkeys(share, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def with_int4_experts(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state with routed experts as compressed-tensors packs them, and with what it unpacks them to."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    scheme = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    stored, plain = {}, {}
    for name, weight in state.items():
        if ".mlp.experts." not in name:
            stored[name] = plain[name] = weight
            continue
        scale = (weight.float().unflatten(1, (-1, 32)).abs().amax(2) / 7).to(torch.bfloat16)
        zero = torch.zeros_like(scale, dtype=torch.int8)
        codes = quantize(weight.float(), scale.float(), zero, scheme, dtype=torch.int8)
        stored[f"{name}_packed"] = pack_to_int32(codes, 4)
        stored[f"{name}_scale"] = scale
        stored[f"{name}_shape"] = torch.tensor(weight.shape, dtype=torch.int32)
        plain[name] = dequantize(codes, scale, zero, scheme)
    return stored, plain


def with_fp8(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state with matrices of layers in FP8, scales of 128 x 128; and what they stand for."""
    stored, plain = {}, {}
    for name, weight in state.items():
        is_plain = weight.ndim != 2 or ".layers." not in name or name.endswith("mlp.gate.weight")
        if is_plain or name.startswith("vision_tower"):
            stored[name] = plain[name] = weight
            continue
        codes, scales, values = fp8_blocks(weight)
        stored |= {name: codes, f"{name}_scale_inv": scales}
        plain[name] = values.to(weight.dtype)
    return stored, plain


def fp8_blocks(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and their product in float32 of a matrix, block by block."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    values = torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128)
            block = weight[here].float()
            scales[i, j] = block.abs().max() / 448
            codes[here] = (block / scales[i, j]).to(torch.float8_e4m3fn)
            values[here] = codes[here].float() * scales[i, j]
    return codes, scales, values
