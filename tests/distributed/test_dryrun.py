"""The dry run: the real model's totals, faults that are planted in it, and the bytes of real runs."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from k25_train.compose.resolve import compose
from k25_train.parameters.released import EXPERTS, count_parameters
from k25_train.plan.memory.states import pipeline_states
from k25_train.plan.optimizer import encoder_state_bytes, optimizer_state_bytes, stage_states
from k25_train.plan.pipeline import plan_pipeline
from tests.helpers import dry_faults
from tests.helpers.dry_runs import dry_dict, dry_dict_with
from tests.helpers.project_sources import REPO
from tests.helpers.ranks import RankContext, RankError, run_ranks
from tests.helpers.runs import SHRUNK, layout, overrides, start_run
from tests.helpers.trained import trained_vision

pytestmark = pytest.mark.distributed

REAL = ["experiment=k25_pretrain_4k"]
MAX_PARAMETERS = 120
"""More than the shrunk model has."""
AS_SMOKE = [*SHRUNK, *layout(pp=2, vpp=2, ep=2, dp=2)]


def dry(arguments: Sequence[str]) -> dict[str, Any]:
    """The findings of a dry run without faults."""
    return run_ranks(dry_dict, 1, list(arguments))[0]


def check_totals(found: dict[str, Any], arguments: Sequence[str]) -> None:
    """No problem, and parameters exactly as the configuration counts them, in sum and by part."""
    counts = count_parameters(compose(arguments).model)
    assert found["problems"] == []
    assert found["parameters"] == counts.total
    parts = [stage["parameters"] for stage in found["stages"]]
    experts = sum(module.total for module in counts.modules if module.module == EXPERTS)
    assert sum(part["experts"] for part in parts) == experts
    assert [part["vision"] for part in parts] == [counts.vision] + [0] * (len(parts) - 1)


def check_states(found: dict[str, Any], arguments: Sequence[str]) -> None:
    """Weights, gradients and optimizer state of every rank are planned to the byte."""
    states = pipeline_states(plan_pipeline(compose(arguments)))
    for stage, planned in zip(found["stages"], states, strict=True):
        real = [stage["weights_bytes"], stage["gradients_bytes"], stage["optimizer_bytes_by_dp_rank"]]
        weights = planned.weights + planned.quantized
        assert real == [weights, planned.gradients, list(planned.optimizer)], stage["stage"]


NOTHING_OVERLAPS = ["parallelism.overlap_expert_comm=false", "parallelism.delay_wgrad=false"]
REAL_LAYOUTS = (
    ["optim=muonclip", "dep.mode=coupled"],
    [
        "cluster.nodes=64",
        "optim=muonclip_bf16_in_host",
        "optim.vision_tower.trained=false",
    ],
    [
        "cluster.nodes=64",
        "optim=adamw",
        "dep.mode=coupled",
        *trained_vision("nothing"),
    ],
    ["optim=muonclip", "parallelism.pp=8", "parallelism.vpp=4", "parallelism.ep=32"],
    ["optim=muonclip", "parallelism.vpp=1", "parallelism.ep=8", *NOTHING_OVERLAPS],
    ["optim=adamw", "parallelism.pp=4", "parallelism.vpp=8", "parallelism.ep=64"],
    ["optim=muonclip", "parallelism.overlap_grad_reduce=false", "parallelism.overlap_param_gather=false"],
    [
        "dep.mode=coupled",
        "optim.vision_tower.trained=false",
        "parallelism.pp=8",
        "parallelism.vpp=7",
    ],
    ["cluster.nodes=256", "optim=muonclip"],
    ["optim=muonclip", "model.quantization=int4_qat"],
)
"""More layouts of the real model: stages, experts, nodes, update rules, what of vision is trained."""


@pytest.mark.slow
@pytest.mark.parametrize("arguments", REAL_LAYOUTS, ids=" ".join)
def test_states_of_the_real_model_are_planned_to_the_byte(arguments: list[str]) -> None:
    every = [*REAL, *arguments]
    found = dry(every)
    check_totals(found, every)
    check_states(found, every)


STAGES = (
    *("k25_vit", "k25_projector", "k25_anneal_4k"),
    *(f"k25_midtrain_{name}" for name in ("32k", "64k", "128k", "262k")),
    "sft_zero_vision",
)
"""Stages of the recipe; `k25_pretrain_4k` is dry run below."""


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_is_whole_on_every_rank_and_planned_to_the_byte(stage: str) -> None:
    every = [f"experiment={stage}"]
    found = dry(every)
    check_totals(found, every)
    check_states(found, every)


@pytest.mark.parametrize(
    ("nodes", "optim"),
    [
        pytest.param(32, "adamw", id="256 ranks", marks=pytest.mark.slow),
        pytest.param(32, "muonclip", id="256 ranks, MuonClip"),
        pytest.param(512, "muonclip", id="4096 ranks, MuonClip", marks=pytest.mark.slow),
    ],
)
def test_the_real_model_is_whole_on_every_rank(nodes: int, optim: str) -> None:
    arguments = [*REAL, f"cluster.nodes={nodes}", f"optim={optim}"]
    found = dry(arguments)
    check_totals(found, arguments)
    check_states(found, arguments)
    assert found["parameters"] == 1_026_879_353_328
    assert found["world_size"] == nodes * 8
    layers = [layer for stage in found["stages"] for chunk in stage["layers"] for layer in chunk]
    assert sorted(layers) == list(range(61))
    # Masters and moments of each parameter once in the job, and a step count for each shard.
    optimizer = sum(sum(stage["optimizer_bytes_by_dp_rank"]) for stage in found["stages"])
    config = compose(arguments)
    planned = optimizer_state_bytes(plan_pipeline(config))
    assert planned < optimizer < 1.0001 * planned
    for stage in found["stages"]:
        # bfloat16 weights and float32 gradients of the same padded buffers; router biases come on top.
        assert 0 <= stage["weights_bytes"] - stage["gradients_bytes"] / 2 < 1e5


LAYOUTS = (
    layout(),
    layout(cp=2, dp=2),
    layout(pp=2, vpp=2, ep=4, cp=2, dp=2),
    layout(pp=2, cp=4, ep=2),
    layout(dp=3),
    layout(pp=3, dp=1),
    layout(pp=2, vpp=2, ep=2, dp=4),
    layout(ep=4, dp=2, cp=2),
    [*layout(pp=4, dp=2, ep=2), "parallelism.layout=Et|tttt||L"],
    [*layout(pp=2, vpp=2, ep=2, dp=2), "train.dtype=bfloat16", "parallelism.overlap_grad_reduce=true"],
)
WAYS = (("adamw", "coupled"), ("muonclip", "decoupled"))
"""Optimizer, and how the encoder is run."""


def layouts_and_ways() -> Iterator[Any]:
    """Every layout in every way; by default the ways take turns over the layouts."""
    for (number, arguments), (turn, way) in itertools.product(enumerate(LAYOUTS), enumerate(WAYS)):
        marks = [] if number % len(WAYS) == turn else [pytest.mark.slow]
        yield pytest.param(arguments, *way, marks=marks, id=" ".join([*way, *arguments]))


@pytest.mark.parametrize(("arguments", "optim", "dep"), layouts_and_ways())
def test_any_layout_adds_up(arguments: list[str], optim: str, dep: str) -> None:
    # 24 is a multiple of every data-parallel size above.
    sizes = ["train.global_batch_size=24", "train.eval_sequences=24", f"optim={optim}", f"dep.mode={dep}"]
    every = [*SHRUNK, *sizes, *arguments]
    found = dry(every)
    check_totals(found, every)
    check_states(found, every)
    config = compose(every)
    if dep == "decoupled":
        by_rank = [stage["optimizer_bytes_by_dp_rank"] for stage in found["stages"]]
        planned = optimizer_state_bytes(plan_pipeline(config))
        check_step_counts(sum(map(sum, by_rank)) - planned, config.world_size)
        return
    for stage, state in zip(found["stages"], stage_states(plan_pipeline(config)), strict=True):
        by_rank = stage["optimizer_bytes_by_dp_rank"]
        check_step_counts(sum(by_rank) - state.state_bytes, len(by_rank))


@pytest.mark.parametrize(
    ("trained", "dep"), [("projector", "decoupled"), ("nothing", "decoupled"), ("projector", "coupled")]
)
def test_what_is_frozen_is_built_and_not_updated(trained: str, dep: str) -> None:
    every = [*AS_SMOKE, *trained_vision(trained), f"dep.mode={dep}"]
    found = dry(every)
    check_totals(found, every)
    check_states(found, every)
    config = compose(every)
    assert encoder_state_bytes(config) == 0
    for stage, state in zip(found["stages"], stage_states(plan_pipeline(config)), strict=True):
        by_rank = stage["optimizer_bytes_by_dp_rank"]
        check_step_counts(sum(by_rank) - state.state_bytes, len(by_rank))


@pytest.mark.parametrize("tower", [True, False])
def test_a_frozen_language_model_is_built_and_not_updated(tower: bool) -> None:
    """With the decoupled encoder trained, and with the first stage's projector alone."""
    frozen = ["optim.language_model.trained=false", f"optim.vision_tower.trained={str(tower).lower()}"]
    every = [*AS_SMOKE, *frozen]
    found = dry(every)
    check_totals(found, every)
    check_states(found, every)
    stages = found["stages"]
    assert bool(encoder_state_bytes(compose(every))) is tower
    assert [sum(stage["optimizer_bytes_by_dp_rank"]) > 0 for stage in stages] == [True, tower]


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["projector", "nothing"])
def test_the_real_model_is_whole_with_a_frozen_tower(trained: str) -> None:
    arguments = [*REAL, "cluster.nodes=32", *trained_vision(trained)]
    found = dry(arguments)
    check_totals(found, arguments)
    optimizer = sum(sum(stage["optimizer_bytes_by_dp_rank"]) for stage in found["stages"])
    planned = sum(state.state_bytes for state in stage_states(plan_pipeline(compose(arguments))))
    assert planned < optimizer < 1.0001 * planned


def check_step_counts(num_bytes: int, num_ranks: int) -> None:
    """A step count in 4 bytes for each shard of a parameter is what comes on top of the plan's bytes."""
    assert num_bytes % 4 == 0
    assert 0 <= num_bytes / 4 <= MAX_PARAMETERS * num_ranks


FAULTS: dict[Callable[[], None], list[str]] = {
    dry_faults.drop_a_layer: ["layers", "tensors that no rank holds"],
    dry_faults.embed_in_every_first_chunk: ["tensors that several stages or expert ranks hold"],
    dry_faults.share_experts_wrongly: [
        "tensors that several stages or expert ranks hold",
        "tensors that no rank holds",
    ],
    dry_faults.order_ranks_differently: [
        "rank 2: dp group",
        "rank 2: pp rank",
        "PIPELINE_MODEL_PARALLEL_GROUP",
    ],
    dry_faults.form_groups_in_another_order: ["groups that rank 2 forms"],
    dry_faults.widen_the_dense_layer: ["tensors of another shape", "parameters: dense"],
    dry_faults.build_in_float32: ["tensors of another format"],
    dry_faults.add_an_unknown_parameter: ["tensors of stage 0", "optimizer state of rank 0"],
    dry_faults.freeze_a_parameter: ["parameters updated in stage 0"],
    dry_faults.freeze_the_encoder: ["parameters updated of the encoder"],
    dry_faults.cut_buckets_unevenly: [
        "pipeline stage 0, chunk 0, buffer 0: bucket sizes",
        "pipeline stage 0, chunk 0, buffer 0: buckets",
    ],
    dry_faults.lay_parameters_over_each_other: ["pipeline stage 0, chunk 0, buffer 0: parameter of shape"],
    dry_faults.leave_the_last_shard_to_nobody: [
        "pipeline stage 0, chunk 0: language_model",
        "encoder: vision_tower",
        "parameters updated in stage 0",
    ],
    dry_faults.forget_a_master: ["optimizer of rank 0"],
    dry_faults.skip_a_micro_batch: ["passes of the interleaved schedule"],
    dry_faults.warm_up_late: ["warm-up passes of the stages"],
    dry_faults.leave_sequences_over: ["train.global_batch_size"],
}
"""Fault -> how the keys of problems begin that it must lead to."""


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(plant: Callable[[], None]) -> None:
    arguments = [*AS_SMOKE, "train.dtype=bfloat16"]
    if plant is dry_faults.order_ranks_differently:
        # megatron-core itself refuses that order with experts spread out.
        arguments += ["parallelism.ep=1"]
    problems = run_ranks(dry_dict_with, 1, arguments, plant)[0]["problems"]
    keys = [problem["key"] for problem in problems]
    for expected in FAULTS[plant]:
        assert any(key.startswith(expected) for key in keys), keys
    assert all(problem["rule"] and problem["remedy"] for problem in problems)


def test_without_a_fault_nothing_is_found() -> None:
    assert dry([*AS_SMOKE, "train.dtype=bfloat16"])["problems"] == []


def test_a_parameter_without_a_rule_is_refused() -> None:
    with pytest.raises(RankError, match=r"language_model\.scale \[4\]: no rule says how it is updated"):
        run_ranks(dry_dict_with, 1, AS_SMOKE, dry_faults.add_a_parameter_without_a_rule)


# Against real runs -----------------------------------------------------------------------------------------


def storage_sizes(tensors: list[torch.Tensor]) -> dict[int, int]:
    """Address -> bytes of the memory behind these tensors."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def bytes_after_a_step(context: RankContext, arguments: Sequence[str]) -> tuple[int, int, int, int, int]:
    """Pipeline stage, data-parallel rank, and bytes of weights, gradients and optimizer of a real rank."""
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    with run.data:
        train_step(run, 1)
    models = [module.module for module in run.modules]
    weights = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    trained = [each for model in models for each in model.parameters() if each.requires_grad]
    gradients = [parameter.main_grad for parameter in trained]
    state = []
    for part in run.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for master in group["params"]:
                state += [master, *part.optimizer.state[master].values()]
    of_weights = storage_sizes(weights)
    of_state = {address: size for address, size in storage_sizes(state).items() if address not in of_weights}
    sums = (sum(of_weights.values()), sum(storage_sizes(gradients).values()), sum(of_state.values()))
    return run.topology.pp_rank, run.topology.dp_rank, *sums


@pytest.mark.parametrize(
    "arguments",
    [
        [*layout(pp=2, vpp=2, ep=2, dp=2), "optim=adamw"],
        [*layout(pp=2, ep=2, dp=2), "optim=muonclip", "train.dtype=bfloat16"],
        [
            *layout(pp=2, dp=2),
            "train.dtype=bfloat16",
            "optim.vision_tower.trained=false",
        ],
        [
            *layout(ep=2, dp=4),
            "optim=muonclip",
            "train.dtype=bfloat16",
            "parallelism.overlap_grad_reduce=true",
            "parallelism.overlap_param_gather=true",
        ],
    ],
    ids=" ".join,
)
def test_bytes_are_those_of_a_real_run(data: Path, tmp_path: Path, arguments: list[str]) -> None:
    arguments = overrides(data, tmp_path, *arguments)
    stages = dry(arguments)["stages"]
    for stage, dp_rank, *measured in run_ranks(bytes_after_a_step, 4, arguments):
        expected = stages[stage]
        assert measured == [
            expected["weights_bytes"],
            expected["gradients_bytes"],
            expected["optimizer_bytes_by_dp_rank"][dp_rank],
        ], f"stage {stage}, data-parallel rank {dp_rank}"


# The command -----------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m k25_train.dryrun` on a machine that shows no GPU."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "k25_train.dryrun", *arguments]
    return subprocess.run(line, cwd=REPO, env=env, capture_output=True, text=True, check=False)


def test_the_command_prints_a_table_and_says_what_it_replaced() -> None:
    done = command("experiment=smoke_1gpu", "optim.offload=cpu")
    assert done.returncode == 0, done.stderr
    assert "k25_tiny on 1 ranks: pp 1, vpp 1, ep 1, dp 1 (experts 1)" in done.stdout
    assert "train.transformer_engine=true: built with megatron-core's own layers" in done.stdout
    assert "cluster.device=cuda: no GPU was used" in done.stdout
    assert "optim.offload=cpu: the optimizer's GiB are in host memory." in done.stdout
    assert "OK: 3,316,960 parameters, each built once, as the configuration counts" in done.stdout
    assert "…" not in done.stdout, "a column is cut off"


def test_the_command_prints_json() -> None:
    done = command("experiment=smoke", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parameters"] == 3_316_960
    assert [stage["num_warmup_passes"] for stage in found["stages"]] == [4, 2]


def test_a_bad_configuration_is_refused_before_anything_is_built() -> None:
    done = command("experiment=k25_pretrain_4k", "parallelism.pp=7")
    assert done.returncode == 2
    assert done.stderr.startswith("ConfigError: ")
    assert "parallelism.pp=7" in done.stderr
    assert "Traceback" not in done.stderr


def report_a_fault(context: RankContext) -> str:
    """What the command raises for a fault."""
    from k25_train.dryrun.__main__ import run

    dry_faults.drop_a_layer()
    try:
        run(compose([*AS_SMOKE]), as_json=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def test_a_fault_is_an_error_with_rule_and_remedy() -> None:
    text = run_ranks(report_a_fault, 1)[0]
    assert text.startswith("DryRunError: ")
    assert "problems in what the job would build\n  layers=[" in text
    assert "-> correct the layout" in text


# The fake process group ------------------------------------------------------------------------------------


def be_two_ranks(context: RankContext) -> dict[str, Any]:
    """Be rank 1 of 4, then the last of 4,096, in one process."""
    import torch.distributed as dist

    from parallel.fake_group import fake_rank

    found: dict[str, Any] = {}
    new_group = dist.new_group
    for rank, size in ((1, 4), (4095, 4096)):
        with fake_rank(rank, size) as groups:
            mine = dist.new_group([0, rank], group_desc="MINE")
            dist.new_group([0, 2], group_desc="OTHERS")
            found[str(size)] = (dist.get_rank(), dist.get_world_size(), mine.size(), mine.rank(), groups)
    found["left"] = not dist.is_initialized() and dist.new_group is new_group
    return found


def test_one_process_is_any_rank_and_learns_of_all_groups() -> None:
    found = run_ranks(be_two_ranks, 1)[0]
    assert found["4"] == (1, 4, 2, 1, {"MINE": [(0, 1)], "OTHERS": [(0, 2)]})
    assert found["4096"] == (4095, 4096, 2, 1, {"MINE": [(0, 4095)], "OTHERS": [(0, 2)]})
    assert found["left"]
