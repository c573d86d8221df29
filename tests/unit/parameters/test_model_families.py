"""Models of other families, which are for plans alone, against what was published of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose
from k25_train.compose.trainable import compose_trainable
from k25_train.config.model import ModelConfig
from k25_train.convert.hf_config import describe, model_of
from k25_train.errors import CheckpointError, ConfigError
from k25_train.parameters.megatron import iterate_parameters
from k25_train.parameters.released import count_parameters, iterate_tensors
from k25_train.parameters.update_rules import rule_of
from k25_train.plan.batch_sizes import BatchSizes
from k25_train.plan.flops import attention_multiply_adds, layer_forward_flops, training_flops
from k25_train.plan.memory.activations import saved_tensors
from k25_train.plan.memory.stage import stage_memories
from k25_train.plan.pass_sizes import balanced_sizes
from k25_train.plan.pipeline import plan_pipeline
from tests.helpers.hf_folders import text_config
from tests.helpers.trained import LANGUAGE_MODEL

TENTHS_OF_BILLIONS = {
    "qwen3_30b_a3b": (305, 33),
    "qwen3_235b_a22b": (2350, 221),
    "deepseek_v3": (6710, 375),
}
"""Parameters, and those of them that a token passes, in 1e8, cut off, as cards have them: 30.5B and 3.3B,
235B and 22B, 671B and 37B."""
GFLOP_PER_TOKEN = {
    ("qwen3_30b_a3b", 0): 23.0,
    ("qwen3_235b_a22b", 0): 147.8,
    ("deepseek_v3", 0): 249.7,
    ("deepseek_v3", 1): 260.0,
    ("k25_1t", 0): 204.5,
    ("moonlight_16b", 0): 17.16,
}
"""Model and layers of multi-token prediction -> TFLOP/s over tokens/s of runs that others published, for
sequences of 4,096 tokens (tests/golden/published)."""


@pytest.fixture(scope="module")
def models() -> dict[str, ModelConfig]:
    names = {name for name, _ in GFLOP_PER_TOKEN}
    return {name: compose(["experiment=smoke", f"model={name}"]).model for name in names}


@pytest.mark.parametrize("family", TENTHS_OF_BILLIONS)
def test_counts_are_the_published_ones(family: str, models: dict[str, ModelConfig]) -> None:
    count = count_parameters(models[family])
    assert (int(count.total / 1e8), int(count.active / 1e8)) == TENTHS_OF_BILLIONS[family]
    assert count.vision == 0
    assert count.total == sum(each.size for each in iterate_parameters(models[family]))


def test_a_release_without_buffers_has_as_many_tensors(models: dict[str, ModelConfig]) -> None:
    """18,867 in the index of Qwen/Qwen3-30B-A3B, which has no correction bias."""
    tensors = [each for each in iterate_tensors(models["qwen3_30b_a3b"]) if not each.is_buffer]
    assert len({each.name for each in tensors}) == len(tensors) == 18_867


@pytest.mark.parametrize(("family", "mtp_layers"), GFLOP_PER_TOKEN)
def test_flops_per_token_are_the_published_ones(
    family: str, mtp_layers: int, models: dict[str, ModelConfig]
) -> None:
    sizes = BatchSizes.of([4096], [])
    flops = training_flops(models[family], sizes, LANGUAGE_MODEL, mtp_layers=mtp_layers)
    assert flops / 4096 / 1e9 == pytest.approx(GFLOP_PER_TOKEN[family, mtp_layers], rel=0.01)


def test_a_layer_of_prediction_counted_by_hand(models: dict[str, ModelConfig]) -> None:
    """What joins features and embedding, a decoder layer and a head more."""
    model = models["deepseek_v3"]
    joined, head = 2 * 7168 * 7168, 7168 * 129280
    layer = layer_forward_flops(model, 60, [4096]) // 4096
    sizes = BatchSizes.of([4096], [])
    plain, more = (
        training_flops(model, sizes, LANGUAGE_MODEL, mtp_layers=number) // 4096 for number in (0, 1)
    )
    assert more - plain == 3 * (2 * joined + layer + 2 * head)


def test_grouped_heads_counted_by_hand(models: dict[str, ModelConfig]) -> None:
    model = models["qwen3_30b_a3b"]
    assert attention_multiply_adds(model) == 2048 * 32 * 128 + 2048 * 2 * 4 * 128 + 32 * 128 * 2048
    shapes = {each.name.split(".self_attention.")[-1]: each.shape for each in iterate_parameters(model)}
    assert shapes["linear_q_proj.weight"] == (4096, 2048)
    assert shapes["k_proj.weight"] == shapes["v_proj.weight"] == (512, 2048)
    assert shapes["q_norm.weight"] == shapes["k_norm.weight"] == (128,)
    assert not [name for name in shapes if "kv_" in name or "shared" in name or "vision" in name]
    optim = compose(["experiment=smoke"]).optim
    per_head = replace(optim, muon=replace(optim.muon, per_head=True))
    key = "language_model.decoder.layers.0.self_attention.k_proj.weight", (512, 2048)
    assert (rule_of(*key, optim, model).num_matrices, rule_of(*key, per_head, model).num_matrices) == (1, 4)


def test_what_grouped_heads_save() -> None:
    """Keys and values are as narrow as their heads are few; what is not there saves nothing."""
    config = compose(["experiment=k25_pretrain_4k", "model=qwen3_30b_a3b", "activation=keep"])
    saved = saved_tensors(config, balanced_sizes(config)).layer(is_moe=True)
    heads = [each.shape for each in saved if each.name == "mla.up_proj"]
    assert heads == [(4096, 32, 128), (4096, 4, 128), (4096, 4, 128)]
    normed = [each.shape for each in saved if each.name == "mla.latent" and each.shape[-1] > 1]
    assert normed == [(4096, 32, 128), (4096, 4, 128)]
    assert not [each for each in saved if each.name.startswith("shared_expert")]


@pytest.mark.parametrize("dep", ["decoupled", "coupled"])
def test_without_vision_nothing_of_it_is_held(dep: str) -> None:
    text = ["experiment=k25_pretrain_4k", "activation=k2", f"dep.mode={dep}", "model.vision.num_layers=0"]
    config = compose(text)
    assert not config.vision_placement.encoder_parts | config.vision_placement.trained_parts
    first = stage_memories(plan_pipeline(config))[0]
    assert (first.features, first.tower, first.encoding) == (0, 0, 0)
    with_vision = stage_memories(plan_pipeline(compose([*text[:-1]])))[0]
    # Buffers are filled up.
    vision_bytes = 2 * count_parameters(compose([*text[:-1]]).model).vision
    assert with_vision.weights - first.weights == pytest.approx(vision_bytes, abs=1e5)


GROUPED = "model.kv_lora_rank=null model.q_lora_rank=null model.qk_nope_head_dim=0 model.qk_rope_head_dim=32"
GROUPED_4 = f"{GROUPED} model.num_key_value_heads=4 model.v_head_dim=32 model.num_attention_heads=4"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ("model.num_key_value_heads=2", "model.num_key_value_heads=2.*must be null with latent attention"),
        (f"{GROUPED_4} model.num_key_value_heads=null", "must divide num_attention_heads"),
        (
            f"{GROUPED_4} model.num_key_value_heads=3",
            "num_key_value_heads=3.*must divide num_attention_heads",
        ),
        (f"{GROUPED_4} model.q_lora_rank=8", "model.q_lora_rank=8.*must be null where kv_lora_rank is"),
        (f"{GROUPED_4} model.v_head_dim=16", r"model.v_head_dim=16.*qk_nope_head_dim \+ qk_rope_head_dim"),
        ("model.kv_lora_rank=0", "model.kv_lora_rank=0.*must be positive"),
        ("model.qk_nope_head_dim=0", "model.qk_nope_head_dim=0.*must be positive"),
        ("model.num_shared_experts=-1", "model.num_shared_experts=-1.*must not be negative"),
        ("model.vision.num_layers=-1", "model.vision.num_layers=-1.*must not be negative"),
    ],
)
def test_what_no_model_is_like_is_refused(changes: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){expected}"):
        compose(["experiment=smoke", *changes.split()])
    compose(["experiment=smoke", *GROUPED_4.split()])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (GROUPED_4, "model.kv_lora_rank=null"),
        ("model.num_shared_experts=0", "model.num_shared_experts=0"),
        ("model.vision.num_layers=0", "model.vision.num_layers=0"),
    ],
)
def test_what_is_for_plans_alone_is_refused_before_it_is_built(changes: str, key: str) -> None:
    arguments = ["experiment=smoke", *changes.split()]
    with pytest.raises(ConfigError, match=rf"(?s){key}.*can be planned \(k25-plan\), but not built.*->"):
        compose_trainable(arguments)
    compose(arguments)


def test_an_import_is_not_of_a_model_for_plans_alone() -> None:
    """A folder of DeepSeek-V3 gets a tower, as before there was a file without one."""
    path = Path("config.json")
    model = compose(["experiment=smoke", "model=deepseek_v3"]).model
    described = describe(text_config(model), path)
    assert model_of(described, None, path).has_vision
    with pytest.raises(CheckpointError, match=r"(?s)deepseek_v3.yaml.*model.vision.num_layers=0"):
        model_of(described, "deepseek_v3", path)
