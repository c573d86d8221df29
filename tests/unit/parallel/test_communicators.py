"""Communicators: how many there are, what they may take of a GPU together, how they are formed on CUDA."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.dryrun.group_members import Sizes, pipeline
from parallel import topology
from parallel.communicators import (
    MAX_CTAS,
    MAX_SPINNING_CTAS,
    Communicator,
    Sends,
    communicators_of,
    neighbours,
    spinning_ctas,
)
from parallel.fake_group import fake_rank
from parallel.megatron.platform import use_platform
from parallel.pipeline.layout import PipelineLayout
from parallel.topology import build_topology, nccl_options, start_process_group

SCHEDULES = ("upfront", "bubbles")
GPUS = torch.device("cuda", 3)


def flagship(nodes: int, *more: str) -> Config:
    return compose(["experiment=k25_pretrain_4k", f"cluster.nodes={nodes}", *more])


def listed(config: Config) -> list[Communicator]:
    return communicators_of(config.parallelism, config.dep, config.world_size)


# How much they take.


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("nodes", "cp"), [(32, 1), (256, 1), (512, 1), (256, 8)])
def test_all_kernels_that_can_spin_fit_a_gpu_together(nodes: int, cp: int, schedule: str) -> None:
    found = listed(flagship(nodes, f"dep.schedule={schedule}", f"parallelism.cp={cp}"))
    assert ("cp" in {each.group for each in found}) is (cp > 1)
    assert 0 < spinning_ctas(found) <= MAX_SPINNING_CTAS


def test_they_fit_in_a_pipeline_of_two_which_also_uses_the_group_of_all_ranks() -> None:
    config = compose(["experiment=smoke", "dep.schedule=bubbles"])
    found = {each.name: each for each in listed(config)}
    assert found["all ranks"].is_in_step
    assert spinning_ctas(list(found.values())) <= MAX_SPINNING_CTAS


def test_they_would_not_fit_with_the_limit_that_nccl_has_by_itself() -> None:
    found = listed(flagship(32, "dep.schedule=bubbles"))
    assert sum(32 * each.kernels for each in found if each.is_in_step) > MAX_SPINNING_CTAS


def test_every_limit_is_a_power_of_two_to_which_sends_are_rounded() -> None:
    assert all(most & (most - 1) == 0 and most % 4 == 0 for most in MAX_CTAS.values())


@pytest.mark.parametrize(("schedule", "of_all"), [("upfront", 3), ("bubbles", 4)])
def test_few_communicators_span_all_ranks(schedule: str, of_all: int) -> None:
    found = listed(flagship(512, f"dep.schedule={schedule}"))
    spans = [
        each.group for each in found if each.group in ("world", "everyone", "features", "feature_gradients")
    ]
    assert len(spans) == of_all
    assert len(found) <= 10
    assert all(each.purpose for each in found)


def test_one_rank_needs_none() -> None:
    config = compose(["experiment=smoke_1gpu"])
    assert listed(config) == []


# In which order ranks meet.


@pytest.mark.parametrize("size", range(2, 18))
def test_neighbours_meet_without_waiting_in_a_circle(size: int) -> None:
    group = tuple(range(0, 10 * size, 10))
    waiting = {rank: neighbours(rank, group) for rank in group}
    met = set()
    while any(waiting.values()):
        heads = [(rank, peers[0]) for rank, peers in waiting.items() if peers]
        pairs = {(a, b) for a, b in heads if a < b and waiting[b][:1] == [a]}
        assert pairs, f"all wait: {waiting}"
        for a, b in pairs:
            del waiting[a][0], waiting[b][0]
        met |= pairs
    ring = {tuple(sorted((group[i], group[(i + 1) % size]))) for i in range(size)}
    assert met == ring


# What torch is asked for.


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `init_process_group` gets; afterwards the default group is one that is bound to a device."""
    found: dict[str, Any] = {}
    default = SimpleNamespace(bound_device_id=GPUS)
    monkeypatch.setattr(dist, "init_process_group", lambda **options: found.update(options, default=default))
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_group", lambda: default)
    return found


def test_ranks_on_gpus_connect_at_once_and_later_groups_do_not_split(asked: dict[str, Any]) -> None:
    start_process_group(GPUS, 60.0, dist.HashStore())
    assert asked["backend"] == "nccl"
    assert asked["device_id"] == GPUS
    assert asked["pg_options"].config.max_ctas == MAX_CTAS["world"]
    # Still bound, torch would split the default group for each of the 26,000 groups that megatron-core forms.
    assert asked["default"].bound_device_id is None


def test_ranks_on_cpus_are_asked_for_nothing_of_cuda(asked: dict[str, Any]) -> None:
    start_process_group(torch.device("cpu"), 60.0, dist.HashStore())
    assert (asked["backend"], asked["device_id"], asked["pg_options"]) == ("gloo", None, None)
    assert asked["default"].bound_device_id == GPUS


def test_each_group_gets_options_of_its_own() -> None:
    first, second = nccl_options("features"), nccl_options("features")
    assert first is not second
    assert first.config.max_ctas == MAX_CTAS["features"] == 4


@pytest.fixture(params=[1, 2], ids=["whole sequences", "shared sequences"])
def formed(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[topology.Topology, dict[str, list[Any]]]]:
    """Rank 5 of 16 as it is on CUDA, and description of a group -> options of those that were formed."""
    sizes = ["parallelism.pp=4", "parallelism.vpp=2", "parallelism.ep=2", "cluster.gpus_per_node=16"]
    sizes += ["model.num_layers=8", "train.global_batch_size=32", f"parallelism.cp={request.param}"]
    config = compose(["experiment=smoke", *sizes])
    use_platform("cpu")
    options: dict[str, list[Any]] = {}
    with fake_rank(5, 16):
        original = dist.new_group

        def form(ranks: Any = None, *args: Any, pg_options: Any = None, **kwargs: Any) -> Any:
            options.setdefault(kwargs["group_desc"], []).append(pg_options)
            return original(ranks, *args, **kwargs)

        monkeypatch.setattr(dist, "new_group", form)
        yield build_topology(config.parallelism, layout_of(config), GPUS), options
        monkeypatch.undo()


def layout_of(config: Config) -> PipelineLayout:
    from k25_train.plan.pipeline import plan_pipeline

    return plan_pipeline(config).layout


def test_every_communicator_in_use_has_its_limit(
    formed: tuple[topology.Topology, dict[str, list[Any]]],
) -> None:
    built, options = formed
    limits = {
        "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
        "DATA_PARALLEL_GROUP_WITH_CP": "dp_cp",
        "DATA_PARALLEL_GROUP": "dp",
        "EXPERT_DATA_PARALLEL_GROUP": "ep_dp",
        "EXPERT_MODEL_PARALLEL_GROUP": "ep",
        "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "tp_ep_mp",
        "VISION_GROUP": "everyone",
        "VISION_FEATURES_GROUP": "features",
        "VISION_FEATURE_GRADIENTS_GROUP": "feature_gradients",
    }
    if built.cp_size > 1:
        limits |= {"CONTEXT_PARALLEL_GROUP": "cp", "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tp_dp_cp"}
    for description, key in limits.items():
        assert {each.config.max_ctas for each in options[description]} == {MAX_CTAS[key]}, description
    # torch writes a group's ranks into its options.
    every = [id(each) for own in options.values() for each in own if each is not None]
    assert len(set(every)) == len(every)
    assert built.group("world") is dist.distributed_c10d._get_default_group()


def test_groups_of_the_same_ranks_are_one(formed: tuple[topology.Topology, dict[str, list[Any]]]) -> None:
    groups = formed[0].groups
    # Replicas are all ranks of a stage, unless ranks share sequences.
    assert (groups.dp is groups.tp_dp_cp) is (formed[0].cp_size == 1)
    # The host waits for counts while weights are gathered.
    assert groups.dp_cp is groups.intra_dp_cp
    assert groups.tp_dp_cp is not groups.dp_cp
    assert groups.intra_dist_opt is formed[0].group("world")


def test_where_features_precede_gradients_they_share_a_communicator() -> None:
    config = compose(["experiment=smoke"])
    use_platform("cpu")
    with fake_rank(0, 4):
        layout = layout_of(config)
        meta = torch.device("meta")
        built = build_topology(config.parallelism, layout, meta, separates_gradients=False)
        assert built.feature_gradients is built.features


def test_a_pipeline_sends_unbatched_only_with_virtual_stages() -> None:
    plain = communicators_of(flagship(32).parallelism, flagship(32).dep, 256)
    assert {each.sends for each in plain if each.group == "pp"} == {Sends.unbatched}
    config = compose(["experiment=smoke", "parallelism.pp=4", "parallelism.vpp=1", "parallelism.ep=1"])
    assert {each.sends for each in listed(config) if each.group == "pp"} == {Sends.batched}


def test_members_of_a_pipeline_are_those_of_the_dry_run() -> None:
    assert neighbours(0, pipeline(0, Sizes(world=16, pp=4, ep=1, cp=1))) == [4, 12]
