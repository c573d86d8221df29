"""What tensors are, by their names."""

from k25_train.checkpoint.commands.groups import (
    EXPERTS,
    LANGUAGE_MODEL,
    PROJECTOR,
    TOWER,
    State,
    by_pattern,
    common_name,
    parameter_of,
    part_of,
    ranges,
    state_of,
)

LAYER = "language_model.decoder.layers.{}.mlp.experts.gate_up_proj"


def test_states_are_of_their_parameters() -> None:
    weight = LAYER.format(3)
    states = {"param": State.master, "exp_avg": State.first_moment, "exp_avg_sq": State.second_moment}
    assert state_of(weight) is State.weight
    for state, kind in (*states.items(), ("steps", State.other)):
        name = f"optimizer.state.{state}.{weight}"
        assert (state_of(name), parameter_of(name), part_of(name)) == (kind, weight, EXPERTS)


def test_parts_of_the_model() -> None:
    names = {
        "vision_tower.patch_embed.proj.weight": TOWER,
        "optimizer.state.param.mm_projector.proj.0.bias": PROJECTOR,
        "language_model.embedding.word_embeddings.weight": LANGUAGE_MODEL,
        "language_model.decoder.layers.1.mlp.shared_experts.linear_fc1.weight": LANGUAGE_MODEL,
        "language_model.decoder.layers.1.mlp.router.expert_bias": LANGUAGE_MODEL,
    }
    assert {name: part_of(name) for name in names} == names


def test_layers_are_told_together() -> None:
    names = [LAYER.format(number) for number in (1, 2, 3, 5)]
    [(pattern, together)] = by_pattern(names).items()
    assert pattern == LAYER.format("*") and together == names
    assert common_name(names) == LAYER.format("{1-3,5}")
    assert common_name(names[:1]) == names[0]
    assert ranges([0, 1, 2, 7, 9, 10]) == "0-2,7,9-10"
