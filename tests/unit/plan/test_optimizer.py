"""Rules and state of the optimizer as the command prints them."""

import json
import subprocess
import sys
from math import prod

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.optimizer import OptimName
from k25_train.errors import ConfigError
from k25_train.parameters.released import EXPERTS, VISION_MODULES, count_parameters
from k25_train.plan.memory.stage import stage_memories
from k25_train.plan.optimizer import (
    encoder_state_bytes,
    parameter_kinds,
    stage_parameters,
    stage_state,
    stage_states,
)
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.report.memory_lines import host_line
from k25_train.plan.report.optimizer import state_lines
from k25_train.plan.time.optimizer import muon_matrices, optimizer_times, slowest_optimizer
from parallel.muon.plan import newton_schulz_flops
from tests.helpers.project_sources import REPO
from tests.helpers.trained import trained_vision

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
    frozen = [*trained_vision(trained), f"dep.mode={dep}"]
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
    names = ["vision_tower"] if trained == "projector" else ["vision_tower", "mm_projector"]
    lines = list(state_lines(plan_pipeline(config)))
    assert f"frozen: {counts.vision - expected:,} parameters ({', '.join(names)})" in lines


def test_float32_weights_are_their_own_masters() -> None:
    alone = ["experiment=smoke", "parallelism=serial", "cluster.gpus_per_node=1", "optim=adamw"]
    alone.append("dep.mode=coupled")
    [state] = stage_states(plan_pipeline(compose(alone)))
    assert state.state_bytes == state.rank_bytes == 8 * 3_316_960


def test_the_command_explains_every_rule_without_torch() -> None:
    lines = plan("experiment=k25_pretrain_4k", "--optimizer").splitlines()
    [experts] = [line.split("  ") for line in lines if ".mlp.experts.gate_up_proj" in line]
    cells = [cell.strip() for cell in experts if cell.strip()]
    assert cells[1:] == [
        "60", "384 x 4096 x 7168", "Muon", "768 of 2048 x 7168", "yes", "x 1", "gate and up of each expert",
    ]  # fmt: skip
    assert "AdamW: 2,355,626,480 parameters x 12 bytes (master 4 + two moments 8)" in lines
    assert "Muon: 1,024,523,726,848 parameters x 8 bytes (master 4 + momentum 4)" in lines
    table, _, times = "\n".join(lines[lines.index("") + 4 :]).partition("\n\n")
    assert times.startswith("A step of stage 1, computed: ")
    *stages, in_host = table.splitlines()
    assert in_host == "in page-locked host memory: 34.1 GB per rank at most, 273.1 on a node"
    assert [line.split()[0] for line in stages] == [
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


@pytest.mark.parametrize(("offload", "expected"), [("cpu", 1), ("none", 0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_host_holds_masters_and_moments_whatever_weights_are(
    offload: str, expected: int, dtype: str
) -> None:
    config = compose(["experiment=k25_pretrain_4k", f"optim.offload={offload}", f"train.dtype={dtype}"])
    for state in stage_states(plan_pipeline(config)):
        held = 12 * state.num_weights[OptimName.adamw] + 8 * state.num_weights[OptimName.muonclip]
        encoder = 12 * 2_000_000  # at most, of AdamW's part of the tower
        rest = state.host_bytes - expected * held / config.dp
        assert 0 <= rest <= expected * (8 * count_parameters(config.model).vision + encoder) / 256


def test_a_node_of_the_real_run_has_room_for_all_that_is_locked() -> None:
    """65 GB of activations, 34 GB of state, 43 GB for a checkpoint per rank, each byte of state once."""
    pipeline = plan_pipeline(compose(["experiment=k25_pretrain_4k"]))
    line = host_line(pipeline, stage_memories(pipeline))
    assert line.startswith("Node 2 has the most in its host memory, 1,175 GB of 2,147: ")
    assert "521 GB of activations, 273 GB of optimizer state, 341 GB of a checkpoint's copy" in line
    resident = plan_pipeline(compose(["experiment=k25_pretrain_4k", "optim.offload=none"]))
    assert "optimizer state" not in host_line(resident, stage_memories(resident))


def test_state_alone_must_fit_a_node() -> None:
    few = ["experiment=k25_pretrain_4k", "activation=keep", "cluster.host_memory_gib=250"]
    with pytest.raises(ConfigError, match=r"optim.offload=cpu\n.* on a node of 8 ranks with the copy for"):
        compose(few)


def test_the_optimizer_of_the_real_model_in_seconds() -> None:
    """2.0e14 FLOPs and 34 GB a rank on 256 ranks; in bfloat16 the bus is what takes longest."""
    times = slowest_optimizer(plan_pipeline(compose(["experiment=k25_pretrain_4k"])))
    assert times.newton_schulz_flops == pytest.approx(2.02e14, rel=0.01)
    # 53% of the data sheet's 989 TFLOP/s.
    assert times.newton_schulz_s == pytest.approx(0.388, rel=0.05)
    assert times.stream_bytes == pytest.approx(34.1e9, rel=0.01)
    assert times.total_s == pytest.approx(times.stream_s + times.edges_s)
    # 4,096 ranks: the output projection, 7168 x 8192, takes as long as on one.
    in_float32 = ["optim.muon.newton_schulz_dtype=float32", "optim.offload=none", "cluster.nodes=512"]
    many = slowest_optimizer(plan_pipeline(compose(["experiment=k25_pretrain_4k", *in_float32])))
    assert many.newton_schulz_s >= many.largest_matrix_s > 0.2
    assert (many.stream_s, many.edges_s) == (0, 0)


def test_work_is_that_of_the_owners() -> None:
    """FLOPs per rank are a stage's matrices over its replicas, as `plan_owners` spreads them."""
    config = compose(["experiment=smoke", "dep.mode=coupled", "cluster.nodes=1"])
    pipeline = plan_pipeline(config)
    for stage in pipeline.stages:
        matrices = list(muon_matrices(config, stage_parameters(stage)))
        work = sum(each.number * newton_schulz_flops(each.rows, each.cols, 5) for each in matrices)
        assert (
            sum(each.number * each.rows * each.cols for each in matrices)
            == (stage_state(stage).num_weights[OptimName.muonclip])
        )
        assert optimizer_times(stage).newton_schulz_flops == pytest.approx(work / config.dp)
