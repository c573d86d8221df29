"""Our names and layouts against the released checkpoint's, and against transformers' own reading of it."""

from __future__ import annotations

import pytest
import torch

from k25_train.errors import CheckpointError
from k25_train.export.released import entries_of, to_hf, to_ours
from k25_train.parameters.table import TABLE
from tests.helpers.hf_reference import build_hf_reference, random_checkpoint, tiny_model_config

LAYER = "language_model.model.layers"


def test_round_trip_is_exact_and_complete() -> None:
    seen = set()
    for rank in (24, None):
        state = random_checkpoint(tiny_model_config(q_lora_rank=rank))
        ours = to_ours(state)
        back = to_hf(ours)
        assert back.keys() == state.keys()
        for name, tensor in state.items():
            assert torch.equal(back[name], tensor), name
        seen |= {entry.name for entry, _ in entries_of(ours, TABLE.by_name)}
    assert seen == TABLE.by_name.keys()


def test_a_query_that_is_not_compressed_is_one_matrix() -> None:
    state = random_checkpoint(tiny_model_config(q_lora_rank=None))
    assert {name for name in state if ".layers.1.self_attn.q_" in name} == {
        f"{LAYER}.1.self_attn.q_proj.weight"
    }
    query = to_ours(state)["language_model.decoder.layers.1.self_attention.linear_q_proj.weight"]
    assert query.shape == (4 * 24, 64)


def test_our_shapes() -> None:
    state = to_ours(random_checkpoint(tiny_model_config()))
    ours = {name: tuple(tensor.shape) for name, tensor in state.items()}
    decoder = "language_model.decoder.layers"
    assert ours["language_model.embedding.word_embeddings.weight"] == (256, 64)
    assert ours[f"{decoder}.0.mlp.linear_fc1.weight"] == (2 * 96, 64)
    assert ours[f"{decoder}.0.self_attention.linear_kv_down_proj.weight"] == (32 + 8, 64)
    assert ours[f"{decoder}.2.mlp.experts.7.gate_up_proj"] == (2 * 32, 64)
    assert ours[f"{decoder}.2.mlp.experts.7.down_proj"] == (64, 32)
    assert ours[f"{decoder}.1.mlp.router.expert_bias"] == (8,)
    assert ours["vision_tower.patch_embed.proj.weight"] == (48, 588)
    assert f"{decoder}.0.mlp.router.weight" not in ours


def test_experts_equal_those_that_transformers_stacks() -> None:
    hf_model, state = build_hf_reference(tiny_model_config())
    ours = to_ours(state)
    for index, layer in enumerate(hf_model.model.language_model.layers):
        if index == 0:
            continue
        prefix = f"language_model.decoder.layers.{index}.mlp"
        for expert in range(8):
            name = f"{prefix}.experts.{expert}"
            assert torch.equal(ours[f"{name}.gate_up_proj"], layer.mlp.experts.gate_up_proj[expert])
            assert torch.equal(ours[f"{name}.down_proj"], layer.mlp.experts.down_proj[expert])
        assert torch.equal(ours[f"{prefix}.router.expert_bias"], layer.mlp.gate.e_score_correction_bias)


def test_part_of_a_model_is_legal() -> None:
    name = f"{LAYER}.60.self_attn.q_b_proj.weight"
    part = to_ours({name: torch.ones(2, 2)})
    assert list(part) == ["language_model.decoder.layers.60.self_attention.linear_q_up_proj.weight"]
    assert list(to_hf(part)) == [name]


def test_missing_half_of_a_pair_is_named() -> None:
    state = random_checkpoint(tiny_model_config())
    del state[f"{LAYER}.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"missing tensors: \S+layers\.1\.mlp\.experts\.3\.up_proj\."):
        to_ours(state)


@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}.1.mlp.experts.3.gate_proj.weight_packed",
        f"{LAYER}.1.self_attn.k_proj.weight",
        "mm_projector.proj.1.weight",
        "vision_tower.encoder.blocks.weight",
    ],
)
def test_unexpected_names_are_reported(name: str) -> None:
    for convert in (to_ours, to_hf):
        with pytest.raises(CheckpointError, match="unexpected tensors") as error:
            convert({name: torch.ones(1)})
        assert name in str(error.value)


def test_long_lists_are_cut() -> None:
    with pytest.raises(CheckpointError, match="and 12 more"):
        to_ours({f"nothing.{index}.like.this": torch.ones(1) for index in range(20)})
