"""Plans of a step's vision work as a run makes them: complete, of one mind on all ranks, kept by a simulated
step."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.plan.memory.stage import chunk_memory
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.time.step import step_times
from k25_train.plan.vision_planner import BubblePlanner, UpfrontPlanner
from parallel.dep.grid import Grid
from parallel.dep.plan import VisionItem
from parallel.dep.program import Program
from tests.helpers.runs import layout, overrides
from tests.helpers.trained import trained_vision

FAST_NETWORK = "cluster.network_gb_per_s=1000"
GRIDS = (Grid(1, 4, 6), Grid(1, 8, 8), Grid(3, 2, 2))


def configured(pp: int, vpp: int, dp: int, *more: str, cp: int = 1) -> Config:
    sizes = layout(pp=pp, vpp=vpp, dp=dp, cp=cp)
    batch = f"train.global_batch_size={dp * 4 * pp}"
    return compose(overrides(Path("data"), Path("run"), *sizes, batch, "model.num_layers=8", *more))


def items_of(config: Config) -> list[VisionItem]:
    """A few items in all micro-batches but each third one."""
    return [
        VisionItem(GRIDS[(number + index) % len(GRIDS)], replica, number)
        for replica in range(config.dp)
        for number in range(config.num_micro_batches)
        for index in range(number % 3)
    ]


def num_steps(program: Program, *, is_forward: bool) -> Counter[int]:
    """[chunk] -> steps of its pass."""
    found: Counter[int] = Counter()
    for task in chain.from_iterable(program.tasks.values()):
        if task.is_forward is is_forward:
            found[task.chunk] += task.num_steps
    return found


@pytest.mark.parametrize(
    "sizes", [(4, 1, 1, 1), (2, 2, 2, 1), (2, 1, 2, 1), (1, 1, 2, 1), (2, 2, 2, 2), (4, 1, 1, 2)], ids=str
)
def test_every_rank_plans_the_same_and_all_of_its_share(sizes: tuple[int, int, int, int]) -> None:
    *others, cp = sizes
    config = configured(*others, "dep.schedule=bubbles", FAST_NETWORK, cp=cp)
    items, num_layers = items_of(config), config.model.vision.num_layers
    plans = [BubblePlanner(plan_pipeline(config), rank).plan(items) for rank in range(config.world_size)]
    assert all(plan == plans[0][0] for plan, _ in plans)
    places = []
    for rank, (plan, program) in enumerate(plans):
        assert program is not None
        for is_forward in (True, False):
            steps = num_steps(program, is_forward=is_forward)
            assert steps == dict.fromkeys(range(len(plan.chunks[rank])), num_layers)
        for chunk in plan.chunks[rank]:
            numbers = {items[plan.parts[part].item].micro_batch for part in chunk}
            assert len(numbers) == 1, "features of a micro-batch do not wait for another one's"
        places += [position for position in program.tasks if 0 < position < program.num_passes]
    assert bool(places) is (config.parallelism.pp > 1), "only a pipeline leaves ranks idle between passes"
    passes = step_times(plan_pipeline(config)).text.schedules
    for rank, (_, program) in enumerate(plans):
        assert program is not None
        assert program.num_passes == len(passes[rank // config.dp_cp])
        # Ranks that share sequences are as idle as any others.
        assert plans[rank][0].chunks[rank], "a rank encodes nothing"


def test_ranks_are_ready_to_receive_before_they_need_to() -> None:
    config = configured(4, 1, 1, "dep.schedule=bubbles", FAST_NETWORK)
    passes = step_times(plan_pipeline(config)).text.schedules
    for rank in range(config.world_size):
        plan, program = BubblePlanner(plan_pipeline(config), rank).plan(items_of(config))
        assert program is not None
        assert list(program.gradients_from) == sorted(program.gradients_from)
        assert list(program.features_from) == sorted(program.features_from)
        for position, tasks in program.tasks.items():
            for task in tasks:
                number = plan.items[plan.parts[plan.chunks[rank][task.chunk][0]].item].micro_batch
                if not task.is_forward:
                    assert program.gradients_from[number] <= position
        if rank == 0:
            forward = [place for place, each in enumerate(passes[0]) if each.is_forward]
            assert program.features_from[1:] == forward[:-1]


@pytest.mark.parametrize("way", [(), ("dep.schedule=bubbles",)])
def test_a_frozen_tower_has_no_backward_work(way: Sequence[str]) -> None:
    config = configured(4, 1, 1, FAST_NETWORK, *way, *trained_vision("nothing"))
    items = items_of(config)
    planner = BubblePlanner(plan_pipeline(config), 0) if way else UpfrontPlanner(config)
    plan, program = planner.plan(items)
    assert len(plan.parts) == len(items)
    if program is not None:
        assert num_steps(program, is_forward=True).total() > 0
        assert not num_steps(program, is_forward=False)


def test_costly_micro_batches_come_in_the_middle() -> None:
    config = configured(4, 1, 1, "dep.schedule=bubbles")
    planner = BubblePlanner(plan_pipeline(config), 0)
    order = planner.order([[Grid(1, 8, 8)], [], [Grid(1, 2, 2)], [Grid(1, 2, 4)]])
    assert sorted(order) == [0, 1, 2, 3]
    assert order[-1] == 1
    assert order.index(0) in (1, 2)
    assert UpfrontPlanner(config).order([[Grid(1, 8, 8)], []]) == range(2)


def test_no_items_no_work() -> None:
    config = configured(4, 1, 1, "dep.schedule=bubbles")
    plan, program = BubblePlanner(plan_pipeline(config), 1).plan([])
    assert program is not None
    assert (plan.parts, dict(program.tasks)) == ((), {})


def test_large_images_are_computed_again_in_bubbles() -> None:
    """An image of 16,384 patches has no room for its activations between the passes of the real model."""
    config = compose(["experiment=k25_pretrain_4k", "dep.schedule=bubbles", "train.global_batch_size=256"])
    pipeline, memory = plan_pipeline(config), chunk_memory(plan_pipeline(config))
    sizes = (Grid(1, 16, 16), Grid(1, 128, 128))
    items = [VisionItem(grid, replica, 8) for replica in range(config.dp) for grid in sizes]
    plan, _ = BubblePlanner(pipeline, 0).plan(items)
    patches = [[sum(plan.parts[part].num_patches for part in parts) for parts in own] for own in plan.chunks]
    for size, keeps in ((256, True), (16384, False)):
        assert memory.keeps(size) is keeps
        rank = next(rank for rank, own in enumerate(patches) if size in own)
        _, program = BubblePlanner(pipeline, rank).plan(items)
        assert program is not None
        assert list(program.keeps_activations) == list(map(memory.keeps, patches[rank]))
