"""A rank's share of a plan: made alone, it is what a rank takes from the plan of all."""

import random
from collections.abc import Sequence

import pytest

from k25_train.compose.resolve import compose
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.vision_planner import BubblePlanner, BubblePlanners, UpfrontPlanner
from parallel.dep.assignment import _assign, _assign_whole
from parallel.dep.cost import EncoderCost
from parallel.dep.grid import Grid
from parallel.dep.plan import VisionItem, plan_vision
from parallel.dep.plan_share import NO_SHARE, plan_share, share_of
from parallel.dep.transfers import Receiver, transfers_of
from tests.helpers.held_rows import made_up_runs
from tests.helpers.trained import trained_vision

COST = EncoderCost(per_patch=900, per_pair=3, per_token=50)


def random_items(
    draw: random.Random, num_items: int, num_replicas: int, num_micro_batches: int
) -> list[VisionItem]:
    grids = [
        Grid(draw.choice((1, 1, 4)), 2 * draw.randint(1, 20), 2 * draw.randint(1, 20))
        for _ in range(num_items)
    ]
    items = [
        VisionItem(grid, draw.randrange(num_replicas), draw.randrange(num_micro_batches)) for grid in grids
    ]
    return sorted(items, key=lambda item: (item.replica, item.micro_batch))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_a_share_is_what_the_plan_of_all_says_of_a_rank(seed: int, split: bool) -> None:
    draw = random.Random(seed)
    num_replicas, num_ranks, num_micro_batches = draw.choice([(1, 1, 3), (2, 4, 4), (4, 16, 2), (8, 64, 5)])
    items = random_items(draw, draw.choice([0, 1, 5, 40, 300]), num_replicas, num_micro_batches)
    limit = draw.choice([1, 300, 4000])
    plan = plan_vision(items, num_ranks, COST, max_patches_per_chunk=limit, split=split)
    for rank in range(num_ranks):
        receiver = Receiver(rank, rank if rank < num_replicas else None, num_micro_batches)
        own = plan_share(items, num_ranks, COST, receiver, max_patches_per_chunk=limit, split=split)
        assert own == share_of(plan, receiver)
        assert own.transfers == transfers_of(plan, receiver)
        assert own.plan.is_split == plan.is_split
        for number in (number for chunk in own.plan.chunks[rank] for number in chunk):
            part = own.plan.parts[number]
            assert part == plan.parts[number]
            assert own.plan.parts_of(part.item) == plan.parts_of(part.item)


@pytest.mark.parametrize(("trained", "cp"), [("all", 1), ("nothing", 1), ("all", 2)])
def test_planners_share_what_they_plan(trained: str, cp: int) -> None:
    config = compose(
        [
            "experiment=smoke",
            "train.global_batch_size=16",
            "cluster.gpus_per_node=8",
            "dep.schedule=bubbles",
            f"parallelism.cp={cp}",
            *trained_vision(trained),
        ]
    )
    num_micro_batches = config.train.global_batch_size // config.train.micro_batch_size // config.dp
    items = random_items(random.Random(3), 60, config.dp, num_micro_batches)
    for rank in range(config.world_size):
        replica = rank // cp if rank < config.dp_cp else None
        receiver = Receiver(rank, replica, num_micro_batches, made_up_runs(items, cp))
        for planner in (UpfrontPlanner(config), BubblePlanner(plan_pipeline(config), rank)):
            plan, program = planner.plan(items)
            assert planner.share(items, receiver) == (share_of(plan, receiver), program)


def test_each_size_of_batch_has_idle_times_of_its_own() -> None:
    """Of a ramp from two micro-batches to six."""
    ramp = [f"train.batch_ramp.{key}=16" for key in ("start", "increment")]
    sizes = ["train.global_batch_size=48", "cluster.gpus_per_node=8", "dep.schedule=bubbles"]
    config = compose(["experiment=smoke", *sizes, *ramp, "cluster.network_gb_per_s=1000"])
    planners, programs = BubblePlanners(config, 5), []
    for num_micro_batches in (2, 4, 6, 2):
        items = random_items(random.Random(3), 60, config.dp, num_micro_batches)
        receiver = Receiver(5, None, num_micro_batches)
        alone = BubblePlanner(plan_pipeline(config.of_batch(8 * num_micro_batches)), 5)
        assert planners.share(items, receiver) == alone.share(items, receiver)
        programs.append(planners.share(items, receiver)[1])
    assert programs[0] == programs[3]
    assert all(program is not None for program in programs)
    assert len({program.num_passes for program in programs if program is not None}) == 3


@pytest.mark.parametrize(
    "items",
    [
        [VisionItem(Grid(1, 3, 2), 0, 0)],
        [VisionItem(Grid(0, 2, 2), 0, 0)],
        [VisionItem(Grid(1, 2, 2), 1, 0), VisionItem(Grid(1, 2, 2), 0, 0)],
        [VisionItem(Grid(1, 2, 2), 0, 1), VisionItem(Grid(1, 2, 2), 0, 0)],
        [VisionItem(Grid(1, 2, 2), 0, -1)],
        [VisionItem(Grid(1, 2, 2), -1, 0)],
    ],
)
def test_what_is_wrong_is_told_as_for_a_plan(items: Sequence[VisionItem]) -> None:
    with pytest.raises(ValueError, match=r"items\[\d\]") as of_plan:
        plan_vision(items, 2, COST, max_patches_per_chunk=9, split=False)
    with pytest.raises(ValueError, match=r"items\[\d\]") as of_share:
        plan_share(items, 2, COST, Receiver(0, 0, 2), max_patches_per_chunk=9, split=False)
    assert str(of_plan.value) == str(of_share.value)


@pytest.mark.parametrize("seed", range(10))
def test_whole_items_go_where_they_went_before_there_was_a_heap(seed: int) -> None:
    draw = random.Random(seed)
    num_ranks = draw.choice([1, 3, 16, 100])
    costs = [draw.choice([1, 5, 5, 7, draw.randint(1, 50)]) for _ in range(draw.choice([0, 1, 50, 300]))]
    order = sorted(range(len(costs)), key=lambda item: -costs[item])
    limit = max(sum(costs) // num_ranks, 1)
    plain = _assign(costs, [1] * len(costs), order, num_ranks, limit, False, False)
    fast = _assign_whole(costs, order, num_ranks)
    assert fast.ranks == plain.ranks
    assert fast.max_cost == max(plain.max_cost, 0)


def test_nothing_has_no_parts() -> None:
    assert NO_SHARE.parts_of(0) == ()
