"""Rules and state of the optimizer as the command prints them."""

import json
import subprocess
import sys
from math import prod

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.optimizer import OptimName
from k25_train.parameters.released import EXPERTS, VISION_MODULES, count_parameters
from k25_train.plan.optimizer import encoder_state_bytes, parameter_kinds, stage_states
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.report.optimizer import state_lines
from tests.helpers.project_sources import REPO

WITHOUT_TORCH = (
    "import sys; sys.modules['torch'] = sys.modules['megatron'] = None; sys.argv[1:] = {arguments}; "
    "from k25_train.plan.__main__ import main; main()"
)


def plan(*arguments: str) -> str:
    """What the command prints on a machine without torch."""
    code = WITHOUT_TORCH.format(arguments=list(arguments))
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_parameter_is_in_one_kind() -> None:
    config = compose(["experiment=k25_pretrain_4k", "optim=muonclip"])
    kinds = parameter_kinds(config)
    assert len({kind.name for kind in kinds}) == len(kinds)
    sizes = []
    for kind in kinds:
        size = 1
        for length in kind.shape:
            size *= length
        if kind.matrix is not None:
            assert kind.rule.num_matrices * kind.matrix[0] * kind.matrix[1] == size, kind.name
        sizes.append(kind.num_parameters * size)
    assert sum(sizes) == count_parameters(config.model).total
    matrices = sum(kind.num_parameters * kind.rule.num_matrices for kind in kinds)
    assert matrices == 60 * (384 * 3 + 3 + 1) + 3 + 61 * 5 + 27 * 6 + 2


@pytest.mark.parametrize(("optim", "expected"), [("adamw", 12), ("muonclip", 8)])
def test_state_of_the_real_model(optim: str, expected: int) -> None:
    """Embedding, head, norms, biases and two weights of the tower's entry keep AdamW's 12 bytes."""
    config = compose(["experiment=k25_pretrain_4k", f"optim={optim}"])
    counts = count_parameters(config.model)
    states = stage_states(plan_pipeline(config))
    of = {module.module: module.total for module in counts.modules}
    vision_weights = sum(of[name] for name in VISION_MODULES)
    assert sum(sum(state.num_weights.values()) for state in states) == counts.total - vision_weights
    muon = sum(state.num_weights[OptimName.muonclip] for state in states)
    vision = 27 * (4 * 1152**2 + 2 * 1152 * 4304) + 4608 * 4608 + 7168 * 4608
    if optim == "muonclip":
        muon += vision
    encoder = encoder_state_bytes(config)
    total = encoder + sum(state.state_bytes for state in states)
    assert total == 12 * (counts.total - muon) + expected * muon
    if optim == "muonclip":
        latent_norms = 61 * (1536 + 512)
        language = [of[name] for name in ("attention", "dense FFN", "router", EXPERTS, "shared experts")]
        assert muon == sum(language) - latent_norms + vision
    for state in states:
        assert state.rank_bytes == state.state_bytes / 16 + encoder / 256


def test_a_coupled_tower_is_the_first_stages() -> None:
    decoupled, coupled = (
        compose(["experiment=k25_pretrain_4k", f"dep.mode={mode}"]) for mode in ("decoupled", "coupled")
    )
    assert encoder_state_bytes(coupled) == 0
    first, *others = [
        there.state_bytes - alone.state_bytes
        for there, alone in zip(
            stage_states(plan_pipeline(coupled)), stage_states(plan_pipeline(decoupled)), strict=True
        )
    ]
    assert first == encoder_state_bytes(decoupled)
    assert not any(others)


@pytest.mark.parametrize("dep", ["coupled", "decoupled"])
@pytest.mark.parametrize(("trained", "module"), [("projector", "projector"), ("nothing", None)])
def test_what_is_frozen_has_neither_rule_nor_state(trained: str, module: str | None, dep: str) -> None:
    """A projector that is trained behind a frozen tower is the first stage's."""
    frozen = [f"optim.vision.trained={trained}", f"dep.mode={dep}"]
    config = compose(["experiment=k25_pretrain_4k", *frozen])
    counts = count_parameters(config.model)
    of = {each.module: each.total for each in counts.modules}
    expected = 0 if module is None else of[module]
    first, *others = [
        sum(state.num_weights.values()) - sum(alone.num_weights.values())
        for state, alone in zip(
            stage_states(plan_pipeline(config)),
            stage_states(plan_pipeline(compose(["experiment=k25_pretrain_4k"]))),
            strict=True,
        )
    ]
    assert (first, set(others), encoder_state_bytes(config)) == (expected, {0}, 0)
    sizes = [kind.num_parameters * prod(kind.shape) for kind in parameter_kinds(config)]
    assert sum(sizes) == counts.total - counts.vision + expected
    lines = list(state_lines(plan_pipeline(config)))
    assert f"frozen: {counts.vision - expected:,} parameters (optim.vision.trained={trained})" in lines


def test_float32_weights_are_their_own_masters() -> None:
    alone = ["experiment=smoke", "parallelism=serial", "cluster.gpus_per_node=1", "optim=adamw"]
    alone.append("dep.mode=coupled")
    [state] = stage_states(plan_pipeline(compose(alone)))
    assert state.state_bytes == state.rank_bytes == 8 * 3_316_960


def test_the_command_explains_every_rule_without_torch() -> None:
    lines = plan("experiment=k25_pretrain_4k", "optim=muonclip", "--optimizer").splitlines()
    [experts] = [line.split("  ") for line in lines if ".mlp.experts.gate_up_proj" in line]
    cells = [cell.strip() for cell in experts if cell.strip()]
    assert cells[1:] == [
        "60", "384 x 4096 x 7168", "Muon", "768 of 2048 x 7168", "yes", "x 1", "gate and up of each expert",
    ]  # fmt: skip
    assert "AdamW: 2,355,626,480 parameters x 12 bytes (master 4 + two moments 8)" in lines
    assert "Muon: 1,024,523,726,848 parameters x 8 bytes (master 4 + momentum 4)" in lines
    assert [line.split()[0] for line in lines[lines.index("") + 4 :]] == [
        "0",
        "1-14",
        "15",
        "DEP",
        "all",
    ]


def test_the_command_prints_json() -> None:
    found = json.loads(
        plan("experiment=smoke", "optim=muonclip", "optim.muon.per_head=true", "--optimizer", "--json")
    )
    by_name = {kind["name"]: kind for kind in found["parameters"]}
    query = by_name["language_model.decoder.layers.*.self_attention.linear_q_up_proj.weight"]
    assert (query["update"], query["num_matrices"], query["matrix"]) == ("muonclip", 4, [32, 64])
    assert query["reason"] == "one matrix per head"
    assert by_name["mm_projector.proj.0.bias"]["weight_decay"] is False
    assert found["state_bytes_per_parameter"] == {"adamw": 8, "muonclip": 4}
    assert [stage["stage"] for stage in found["stages"]] == [0, 1]
