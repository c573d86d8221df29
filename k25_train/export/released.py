"""Names and layouts: the released Hugging Face checkpoint's against ours, one table for both directions.

Ours are megatron-core's global names. Three tensors differ in layout, not only in name: the gate and up
projections of a SwiGLU stand in one matrix, gate rows first, and the patch embedding is a matrix instead of a
convolution. Values and dtypes are never touched. Source of the checkpoint's names: its safetensors index.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from k25_train.errors import CheckpointError

MAX_NAMES_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor of ours and the checkpoint's tensors that it is made of; `*` stands for an index.

    Both sides have the same indices in the same order. `join` and `split` are each other's inverse.
    """

    ours: str
    hf: tuple[str, ...]
    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]


def same(ours: str, hf: str) -> Rule:
    """The tensor as it is."""
    return Rule(ours, (hf,), join=lambda parts: parts[0], split=lambda tensor: [tensor])


def gate_up(ours: str, hf: str) -> Rule:
    """Gate and up projection, [ffn, hidden] each, as one [2·ffn, hidden] matrix, gate rows first."""
    parts = (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight")
    return Rule(ours, parts, join=torch.cat, split=lambda tensor: list(tensor.chunk(2)))


def patch_matrix(name: str) -> Rule:
    """A [C, 3, p, p] convolution over single patches as the [C, 3·p²] matrix that it is."""

    def to_convolution(matrix: Tensor) -> list[Tensor]:
        edge = math.isqrt(matrix.shape[1] // 3)
        return [matrix.unflatten(1, (3, edge, edge))]

    return Rule(name, (name,), join=lambda parts: parts[0].flatten(1), split=to_convolution)


def language_model_rules() -> list[Rule]:
    """Embedding, layers, final norm and output head."""
    ours, hf = "language_model.decoder.layers.*", "language_model.model.layers.*"
    attention = {
        "linear_q_down_proj": "q_a_proj",
        "q_layernorm": "q_a_layernorm",
        "linear_q_up_proj": "q_b_proj",
        "linear_kv_down_proj": "kv_a_proj_with_mqa",
        "kv_layernorm": "kv_a_layernorm",
        "linear_kv_up_proj": "kv_b_proj",
        "linear_proj": "o_proj",
    }
    return [
        same("language_model.embedding.word_embeddings.weight", "language_model.model.embed_tokens.weight"),
        same("language_model.decoder.final_layernorm.weight", "language_model.model.norm.weight"),
        same("language_model.output_layer.weight", "language_model.lm_head.weight"),
        same(f"{ours}.input_layernorm.weight", f"{hf}.input_layernorm.weight"),
        same(f"{ours}.pre_mlp_layernorm.weight", f"{hf}.post_attention_layernorm.weight"),
        *(
            same(f"{ours}.self_attention.{our_part}.weight", f"{hf}.self_attn.{hf_part}.weight")
            for our_part, hf_part in attention.items()
        ),
        gate_up(f"{ours}.mlp.linear_fc1.weight", f"{hf}.mlp"),
        same(f"{ours}.mlp.linear_fc2.weight", f"{hf}.mlp.down_proj.weight"),
        same(f"{ours}.mlp.router.weight", f"{hf}.mlp.gate.weight"),
        same(f"{ours}.mlp.router.expert_bias", f"{hf}.mlp.gate.e_score_correction_bias"),
        gate_up(f"{ours}.mlp.shared_experts.linear_fc1.weight", f"{hf}.mlp.shared_experts"),
        same(f"{ours}.mlp.shared_experts.linear_fc2.weight", f"{hf}.mlp.shared_experts.down_proj.weight"),
        gate_up(f"{ours}.mlp.experts.*.gate_up_proj", f"{hf}.mlp.experts.*"),
        same(f"{ours}.mlp.experts.*.down_proj", f"{hf}.mlp.experts.*.down_proj.weight"),
    ]


def vision_rules() -> list[Rule]:
    """Tower and projector, which keep the checkpoint's names."""
    block = "vision_tower.encoder.blocks.*"
    affine = [f"{block}.{part}" for part in ("norm0", "norm1", "wqkv", "wo", "mlp.fc0", "mlp.fc1")]
    affine += ["vision_tower.encoder.final_layernorm"]
    affine += ["mm_projector.pre_norm", "mm_projector.proj.0", "mm_projector.proj.2"]
    names = [f"{prefix}.{kind}" for prefix in affine for kind in ("weight", "bias")]
    names += ["vision_tower.patch_embed.proj.bias", "vision_tower.patch_embed.pos_emb.weight"]
    return [patch_matrix("vision_tower.patch_embed.proj.weight"), *(same(name, name) for name in names)]


RULES = (*language_model_rules(), *vision_rules())
RULE_OF_OURS = {rule.ours: rule for rule in RULES}
RULE_OF_HF = {pattern: rule for rule in RULES for pattern in rule.hf}


def to_ours(hf_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the checkpoint's names (unpacked weights) in ours; any subset of the model may be
    given.

    Raises:
        CheckpointError: names that the model does not have, or a gate without its up projection.
    """
    targets = {fill(rule.ours, indices): (rule, indices) for rule, indices in matches(hf_state, RULE_OF_HF)}
    sources = {
        ours: [fill(pattern, indices) for pattern in rule.hf] for ours, (rule, indices) in targets.items()
    }
    missing = [name for parts in sources.values() for name in parts if name not in hf_state]
    if missing:
        raise CheckpointError(f"missing tensors: {shown(missing)}; the other half of the pair is there")
    return {
        ours: rule.join([hf_state[name] for name in sources[ours]]) for ours, (rule, _) in targets.items()
    }


def to_hf(our_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_ours`; split tensors are views of the given ones.

    Raises:
        CheckpointError: names that the model does not have.
    """
    hf_state: dict[str, Tensor] = {}
    for ours, (rule, indices) in zip(our_state, matches(our_state, RULE_OF_OURS), strict=True):
        parts = rule.split(our_state[ours])
        hf_state |= {fill(name, indices): part for name, part in zip(rule.hf, parts, strict=True)}
    return hf_state


def matches(state: Mapping[str, Tensor], rules: Mapping[str, Rule]) -> list[tuple[Rule, list[str]]]:
    """The rule and the indices of every name; raises CheckpointError naming all that no rule knows."""
    found: list[tuple[Rule, list[str]]] = []
    unexpected = []
    for name in state:
        indices = re.findall(r"(?<=\.)\d+(?=\.)", name)
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        if name in rules:
            found.append((rules[name], []))
        elif pattern in rules:
            found.append((rules[pattern], indices))
        else:
            unexpected.append(name)
    if unexpected:
        raise CheckpointError(f"unexpected tensors: {shown(unexpected)}; the model has no such parameters")
    return found


def fill(pattern: str, indices: list[str]) -> str:
    """Put the indices in the places of `*`, in order."""
    remaining = iter(indices)
    return re.sub(r"\*", lambda _: next(remaining), pattern)


def shown(names: list[str]) -> str:
    """The first few names, and how many there are."""
    rest = len(names) - MAX_NAMES_SHOWN
    return ", ".join(names[:MAX_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
