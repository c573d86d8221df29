"""Which rule each parameter falls under."""

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.optimizer import OptimConfig, OptimName
from k25_train.config.schema import Config
from k25_train.parameters.megatron import TrainedParameter, iterate_parameters
from k25_train.parameters.update_rules import ParameterRule, is_trained, rule_of

MUON = {
    "language_model.decoder.layers.*.self_attention.linear_q_down_proj.weight": (1, (1536, 7168)),
    "language_model.decoder.layers.*.self_attention.linear_q_up_proj.weight": (1, (12288, 1536)),
    "language_model.decoder.layers.*.self_attention.linear_kv_down_proj.weight": (1, (576, 7168)),
    "language_model.decoder.layers.*.self_attention.linear_kv_up_proj.weight": (1, (16384, 512)),
    "language_model.decoder.layers.*.self_attention.linear_proj.weight": (1, (7168, 8192)),
    "language_model.decoder.layers.*.mlp.linear_fc1.weight": (2, (18432, 7168)),
    "language_model.decoder.layers.*.mlp.linear_fc2.weight": (1, (7168, 18432)),
    "language_model.decoder.layers.*.mlp.router.weight": (1, (384, 7168)),
    "language_model.decoder.layers.*.mlp.shared_experts.linear_fc1.weight": (2, (2048, 7168)),
    "language_model.decoder.layers.*.mlp.shared_experts.linear_fc2.weight": (1, (7168, 2048)),
    "language_model.decoder.layers.*.mlp.experts.gate_up_proj": (768, (2048, 7168)),
    "language_model.decoder.layers.*.mlp.experts.down_proj": (384, (7168, 2048)),
}
MUON_OF_VISION = {
    "vision_tower.encoder.blocks.*.wqkv.weight": (3, (1152, 1152)),
    "vision_tower.encoder.blocks.*.wo.weight": (1, (1152, 1152)),
    "vision_tower.encoder.blocks.*.mlp.fc0.weight": (1, (4304, 1152)),
    "vision_tower.encoder.blocks.*.mlp.fc1.weight": (1, (1152, 4304)),
    "mm_projector.proj.0.weight": (1, (4608, 4608)),
    "mm_projector.proj.2.weight": (1, (7168, 4608)),
}
TABLES_AND_INPUTS = {
    "language_model.embedding.word_embeddings.weight",
    "language_model.output_layer.weight",
    "vision_tower.patch_embed.proj.weight",
    "vision_tower.patch_embed.pos_emb.weight",
}


@pytest.fixture(scope="module")
def pretrain() -> Config:
    return compose(["experiment=k25_pretrain_4k", "optim=muonclip"])


def rules(config: Config, optim: OptimConfig) -> Iterator[tuple[str, TrainedParameter, ParameterRule]]:
    """Name with * for a layer's number, parameter and rule."""
    for parameter in iterate_parameters(config.model):
        pattern = re.sub(r"\.(layers|blocks)\.\d+\.", r".\1.*.", parameter.name)
        yield pattern, parameter, rule_of(*parameter, optim, config.model)


def muon_matrices(config: Config, optim: OptimConfig) -> dict[str, tuple[int, tuple[int, int]]]:
    """Name -> number and (rows, columns) of the matrices of each parameter that Muon updates."""
    found = {}
    for pattern, parameter, rule in rules(config, optim):
        if rule.update is OptimName.muonclip:
            columns = parameter.shape[-1]
            found[pattern] = rule.num_matrices, (parameter.size // columns // rule.num_matrices, columns)
    return found


def test_muon_updates_these_and_adamw_the_rest(pretrain: Config) -> None:
    assert muon_matrices(pretrain, pretrain.optim) == MUON | MUON_OF_VISION
    adamw = {
        pattern
        for pattern, parameter, rule in rules(pretrain, pretrain.optim)
        if rule.update is OptimName.adamw and len(parameter.shape) > 1
    }
    assert adamw == TABLES_AND_INPUTS


def test_the_tower_has_a_choice_of_its_own(pretrain: Config) -> None:
    tower = replace(pretrain.optim.vision_tower, name=OptimName.adamw, lr_scale=0.5)
    projector = replace(pretrain.optim.mm_projector, name=OptimName.adamw, lr_scale=0.25)
    language_model = replace(pretrain.optim.language_model, name=OptimName.adamw, lr_scale=2.0)
    of_vision = replace(pretrain.optim, vision_tower=tower, mm_projector=projector)
    assert muon_matrices(pretrain, of_vision) == MUON
    assert muon_matrices(pretrain, replace(pretrain.optim, language_model=language_model)) == MUON_OF_VISION
    every = replace(of_vision, language_model=language_model)
    scales = {"vision_tower": 0.5, "mm_projector": 0.25, "language_model": 2.0}
    for _, parameter, rule in rules(pretrain, every):
        assert rule.lr_scale == scales[parameter.name.split(".")[0]], parameter.name


@pytest.mark.parametrize(
    ("changed", "frozen"),
    [
        ((), set()),
        (("vision_tower",), {"vision_tower"}),
        (("vision_tower", "mm_projector"), {"vision_tower", "mm_projector"}),
        (("language_model",), {"language_model"}),
        (("language_model", "vision_tower"), {"language_model", "vision_tower"}),
    ],
)
def test_what_is_trained_is_said_by_name(
    changed: tuple[str, ...], frozen: set[str], pretrain: Config
) -> None:
    parts = {part: replace(getattr(pretrain.optim, part), trained=False) for part in changed}
    optim = replace(pretrain.optim, **parts)
    names = {parameter.name for parameter in iterate_parameters(pretrain.model)}
    assert {name.split(".")[0] for name in names if not is_trained(name, optim)} == frozen
    assert {name.split(".")[0] for name in names if is_trained(name, optim)}.isdisjoint(frozen)


def test_heads_are_matrices_of_their_own_on_request(pretrain: Config) -> None:
    per_head = replace(pretrain.optim, muon=replace(pretrain.optim.muon, per_head=True))
    attention = "language_model.decoder.layers.*.self_attention"
    changed = {
        f"{attention}.linear_q_up_proj.weight": (64, (192, 1536)),
        f"{attention}.linear_kv_up_proj.weight": (64, (256, 512)),
    }
    assert muon_matrices(pretrain, per_head) == MUON | MUON_OF_VISION | changed


def test_nothing_with_one_axis_decays_and_all_else_does(pretrain: Config) -> None:
    for _, parameter, rule in rules(pretrain, pretrain.optim):
        assert rule.weight_decay == (len(parameter.shape) > 1), parameter.name
        if len(parameter.shape) == 1:
            assert (rule.update, rule.num_matrices) == (OptimName.adamw, 0)


def test_a_rank_with_some_of_the_experts_has_their_matrices(pretrain: Config) -> None:
    name = "language_model.decoder.layers.0.mlp.experts."
    for stack, shape, expected in (
        ("gate_up_proj", (24, 4096, 7168), 48),
        ("down_proj", (24, 7168, 2048), 24),
    ):
        assert rule_of(name + stack, shape, pretrain.optim, pretrain.model).num_matrices == expected


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("language_model.decoder.layers.3.mlp.linear_fc3.weight", (8, 8), "no rule says how"),
        ("module.language_model.output_layer.weight", (8, 8), "no rule says how"),
        ("language_model.decoder.layers.x.mlp.linear_fc1.weight", (8, 8), "no rule says how"),
        ("language_model.decoder.layers.3.mlp.router.expert_bias", (8,), "no rule says how"),
        ("language_model.decoder.layers.3.mlp.linear_fc1.weight", (7, 8), "must be 2 matrices of equal size"),
        ("language_model.decoder.layers.3.mlp.linear_fc2.weight", (8,), "must be 1 matrices"),
        ("vision_tower.encoder.blocks.0.wqkv.weight", (4, 8), "must be 3 matrices of equal size"),
    ],
)
def test_what_the_table_does_not_know_is_refused(
    pretrain: Config, name: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        rule_of(name, shape, pretrain.optim, pretrain.model)
    assert name in str(caught.value)
    assert "k25_train/parameters/table.py" in str(caught.value)
