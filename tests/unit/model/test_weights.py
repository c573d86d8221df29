"""Global names, and initial values that depend on nothing but the seed and the name."""

import math

import pytest
import torch
from torch import Tensor, nn

from k25_train.model.weights import (
    ChunkPlace,
    global_state,
    initial_value,
    initialize,
    load_global_state,
)

MATRIX = "language_model.decoder.layers.3.self_attention.linear_proj.weight"


def value(name: str, *shape: int, seed: int = 7, std: float = 0.02) -> Tensor:
    return initial_value(name, torch.Size(shape), seed, std)


def test_the_value_depends_on_seed_and_name_only() -> None:
    first = value(MATRIX, 40, 50)
    torch.manual_seed(99)
    torch.randn(1000)
    assert torch.equal(value(MATRIX, 40, 50), first)
    assert not torch.equal(value(MATRIX, 40, 50, seed=8), first)
    assert not torch.equal(value(MATRIX.replace("3", "4"), 40, 50), first)


def test_initialising_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    value(MATRIX, 40, 50)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "name",
    [
        "language_model.decoder.layers.0.input_layernorm.weight",
        "language_model.decoder.layers.0.self_attention.q_layernorm.weight",
        "language_model.decoder.final_layernorm.weight",
        "vision_tower.encoder.blocks.1.norm0.weight",
        "vision_tower.encoder.final_layernorm.weight",
        "mm_projector.pre_norm.weight",
    ],
)
def test_norms_start_at_one(name: str) -> None:
    assert torch.equal(value(name, 8), torch.ones(8))


@pytest.mark.parametrize(
    "name",
    [
        "language_model.decoder.layers.1.mlp.router.expert_bias",
        "vision_tower.encoder.blocks.1.norm0.bias",
        "vision_tower.encoder.blocks.1.wqkv.bias",
        "mm_projector.proj.0.bias",
    ],
)
def test_biases_start_at_zero(name: str) -> None:
    assert torch.equal(value(name, 8), torch.zeros(8))


@pytest.mark.parametrize(
    ("name", "shape", "std"),
    [
        (MATRIX, (200, 300), 0.02),
        ("language_model.embedding.word_embeddings.weight", (200, 300), 0.02),
        ("language_model.decoder.layers.1.mlp.experts.5.gate_up_proj", (200, 300), 0.02),
        ("vision_tower.patch_embed.pos_emb.weight", (20, 20, 100), 0.02),
        ("vision_tower.encoder.blocks.1.wqkv.weight", (200, 300), 1 / math.sqrt(300)),
        ("mm_projector.proj.2.weight", (300, 200), 1 / math.sqrt(200)),
    ],
)
def test_matrices_are_normal_with_the_documented_deviation(
    name: str, shape: tuple[int, ...], std: float
) -> None:
    weights = value(name, *shape)
    assert weights.std().item() == pytest.approx(std, rel=0.02)
    assert abs(weights.mean().item()) < 0.02 * std


class Chunk(nn.Module):
    """The names of a pipeline chunk with two local experts, and modules with an extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = nn.Module()
        self.language_model.decoder = nn.Module()
        self.language_model.decoder.layers = nn.ModuleList([nn.Module(), nn.Module()])
        for layer in self.language_model.decoder.layers:
            layer.mlp = nn.Module()
            layer.mlp.experts = nn.Module()
            layer.mlp.experts.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 3))
            layer.mlp.experts.down_proj = nn.Parameter(torch.zeros(2, 3, 2))
            layer.mlp.router = WithExtraState(torch.ones(1, dtype=torch.uint8))
            layer.mlp.linear_fc2 = WithExtraState(None)


class WithExtraState(nn.Module):
    """As Transformer Engine's modules (bytes) and megatron-core's linear layers (None)."""

    def __init__(self, extra: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3))
        self.extra = extra

    def get_extra_state(self) -> Tensor | None:
        return self.extra

    def set_extra_state(self, state: Tensor | None) -> None:
        raise AssertionError("nothing sets it")


PLACE = ChunkPlace(first_layer=5, first_expert=6)


def test_layers_and_experts_have_global_numbers_and_extra_states_are_no_weights() -> None:
    names = [name for name, _ in global_state(Chunk(), PLACE)]
    layers = "language_model.decoder.layers"
    assert sorted(names) == sorted(
        f"{layers}.{layer}.{rest}"
        for layer in (5, 6)
        for rest in (
            "mlp.experts.6.gate_up_proj",
            "mlp.experts.7.gate_up_proj",
            "mlp.experts.6.down_proj",
            "mlp.experts.7.down_proj",
            "mlp.router.weight",
            "mlp.linear_fc2.weight",
        )
    )


def test_a_chunk_gets_the_values_of_its_place_in_the_whole_model() -> None:
    chunk = Chunk()
    initialize(chunk, PLACE, seed=7, std=0.02)
    stacked = chunk.language_model.decoder.layers[1].mlp.experts.down_proj
    expected = value("language_model.decoder.layers.6.mlp.experts.7.down_proj", 3, 2)
    assert torch.equal(stacked[1], expected)


def test_a_whole_models_tensors_load_into_a_chunk() -> None:
    source, target = Chunk(), Chunk()
    initialize(source, PLACE, seed=3, std=1.0)
    state = dict(global_state(source, PLACE))
    load_global_state(target, PLACE, state)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    del state["language_model.decoder.layers.6.mlp.linear_fc2.weight"]
    with pytest.raises(KeyError, match=r"layers\.6\.mlp\.linear_fc2\.weight' among the 11 given"):
        load_global_state(target, PLACE, state)
