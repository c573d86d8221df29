"""The parameter count against the released checkpoint's listing."""

import json
import os
import subprocess
import sys

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.model import ModelConfig
from k25_train.parameters.released import EXPERTS, TensorSpec, count_parameters, iterate_tensors

LAYER = "language_model.model.layers.{layer}."
LISTED = {
    "language_model.lm_head.weight": (163840, 7168),
    "language_model.model.embed_tokens.weight": (163840, 7168),
    "language_model.model.norm.weight": (7168,),
    "vision_tower.patch_embed.proj.weight": (1152, 3, 14, 14),
    "vision_tower.patch_embed.proj.bias": (1152,),
    "vision_tower.patch_embed.pos_emb.weight": (64, 64, 1152),
    "vision_tower.encoder.final_layernorm.weight": (1152,),
    "vision_tower.encoder.final_layernorm.bias": (1152,),
    "mm_projector.pre_norm.weight": (1152,),
    "mm_projector.pre_norm.bias": (1152,),
    "mm_projector.proj.0.weight": (4608, 4608),
    "mm_projector.proj.0.bias": (4608,),
    "mm_projector.proj.2.weight": (7168, 4608),
    "mm_projector.proj.2.bias": (7168,),
}
LISTED_PER_LAYER = {
    "input_layernorm.weight": (7168,),
    "post_attention_layernorm.weight": (7168,),
    "self_attn.q_a_proj.weight": (1536, 7168),
    "self_attn.q_a_layernorm.weight": (1536,),
    "self_attn.q_b_proj.weight": (12288, 1536),
    "self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
    "self_attn.kv_a_layernorm.weight": (512,),
    "self_attn.kv_b_proj.weight": (16384, 512),
    "self_attn.o_proj.weight": (7168, 8192),
}
LISTED_DENSE = {
    "mlp.gate_proj.weight": (18432, 7168),
    "mlp.up_proj.weight": (18432, 7168),
    "mlp.down_proj.weight": (7168, 18432),
}
LISTED_MOE = {
    "mlp.gate.weight": (384, 7168),
    "mlp.gate.e_score_correction_bias": (384,),
    "mlp.shared_experts.gate_proj.weight": (2048, 7168),
    "mlp.shared_experts.up_proj.weight": (2048, 7168),
    "mlp.shared_experts.down_proj.weight": (7168, 2048),
}
# Unpacked: eight INT4 values are in one int32 of the release's [2048, 896] and [7168, 256].
LISTED_EXPERT = {
    "gate_proj.weight": (2048, 896 * 8),
    "up_proj.weight": (2048, 896 * 8),
    "down_proj.weight": (7168, 256 * 8),
}
LISTED_BLOCK = {
    "norm0": (1152,),
    "norm1": (1152,),
    "wqkv": (3456, 1152),
    "wo": (1152, 1152),
    "mlp.fc0": (4304, 1152),
    "mlp.fc1": (1152, 4304),
}


@pytest.fixture(scope="module")
def released() -> ModelConfig:
    """The real model, with the shapes of the release."""
    return compose(["experiment=k25_pretrain_4k"]).model


def listing() -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the release, experts unpacked."""
    names = dict(LISTED)
    for block in range(27):
        for name, shape in LISTED_BLOCK.items():
            names[f"vision_tower.encoder.blocks.{block}.{name}.weight"] = shape
            names[f"vision_tower.encoder.blocks.{block}.{name}.bias"] = shape[:1]
    for layer in range(61):
        tensors = LISTED_PER_LAYER | (LISTED_DENSE if layer == 0 else LISTED_MOE)
        if layer > 0:
            for expert in range(384):
                tensors |= {f"mlp.experts.{expert}.{name}": shape for name, shape in LISTED_EXPERT.items()}
        names |= {LAYER.format(layer=layer) + name: shape for name, shape in tensors.items()}
    return names


def test_names_and_shapes_are_the_released_checkpoints(released: ModelConfig) -> None:
    ours = {tensor.name: tensor.shape for tensor in iterate_tensors(released)}
    theirs = listing()
    assert set(ours) == set(theirs)
    assert ours == theirs


def test_the_release_lists_as_many_tensors(released: ModelConfig) -> None:
    # Each routed matrix is three tensors there: packed values, scales and its shape.
    assert sum(3 if tensor.module == EXPERTS else 1 for tensor in iterate_tensors(released)) == 208_550


def test_only_the_correction_bias_is_a_float32_buffer(released: ModelConfig) -> None:
    special = [t for t in iterate_tensors(released) if t.is_buffer or t.dtype != "bfloat16"]
    assert len(special) == 60
    assert all(t.name.endswith("e_score_correction_bias") and t.is_buffer for t in special)
    assert {t.dtype for t in special} == {"float32"}


def test_totals_of_the_released_model(released: ModelConfig) -> None:
    counts = count_parameters(released)
    assert round((counts.total - counts.vision) / 1e8) == 10_264
    assert round(counts.active / 1e8) == 329
    assert round(counts.active_without_embedding / 1e8) == 317
    assert round(counts.vision / 1e6) == 471
    of = {module.module: module.total for module in counts.modules}
    assert round(of["vision tower"] / 1e5) == 4_169
    assert round(of["projector"] / 1e5) == 543


def test_tiny_model_counted_by_hand() -> None:
    model = compose(["experiment=smoke"]).model
    model.num_layers, model.num_dense_layers, model.num_experts, model.num_experts_per_token = 2, 1, 3, 2
    model.num_shared_experts, model.hidden_size, model.vocab_size = 2, 8, 10
    model.dense_ffn_hidden_size, model.expert_ffn_hidden_size = 6, 4
    of = {module.module: module for module in count_parameters(model).modules}
    assert of["embedding"].total == of["output head"].total == 80
    assert of["norms"].total == 5 * 8
    assert of["dense FFN"].total == 3 * 6 * 8
    assert of["router"].total == 3 * 8
    assert of["routed experts"].total == 3 * (3 * 4 * 8)
    assert of["routed experts"].active == 2 * (3 * 4 * 8)
    assert of["shared experts"].total == 2 * (3 * 4 * 8)


def test_size_is_the_number_of_elements() -> None:
    assert TensorSpec("x", (2, 3, 4), "m").size == 24


def run_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "k25_train.plan", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "80"},
    )


def test_command_prints_table_and_totals() -> None:
    done = run_plan("experiment=k25_pretrain_4k", "--details")
    assert done.returncode == 0, done.stderr
    assert "1,026,879,353,328" in done.stdout
    assert "language model 1026.4B, vision 471.1M" in done.stdout
    assert "a text token uses 32.9B, 31.7B without the input embedding" in done.stdout
    assert "layout over pp 16 x vpp 2: Ett|tt|tt|" in done.stdout
    # 67.1M tokens of 7168 bfloat16 values cross 31 borders, forward and back, between 256 ranks.
    assert "│ pipeline              │     233.002 │" in done.stdout


def test_command_prints_json() -> None:
    done = run_plan("experiment=smoke", "model.num_experts=16", "--json")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["model"] == "k25_tiny"
    assert counts["layout"] == "Ett|t|tt|L"
    assert set(counts["communication"]) >= {"pipeline", "all-to-all", "reduce-scatter", "all-gather"}
    assert counts["parameters"]["total"] == sum(m["total"] for m in counts["parameters"]["modules"])


def test_command_refuses_without_a_traceback() -> None:
    done = run_plan("experiment=smoke", "train.stpes=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "did you mean steps?" in done.stderr
    assert "Traceback" not in done.stderr
