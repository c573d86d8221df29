"""What images cost by the plan of a step, against the planners that place them and sequences drawn."""

import random
from collections import Counter

import pytest

from k25_train.compose.resolve import compose
from k25_train.plan.assumptions import Assumptions
from k25_train.plan.flops import encoder_cost
from k25_train.plan.kernels.encoder import encoder_kernels
from k25_train.plan.kernels.kernel import Precision
from k25_train.plan.kernels.seconds import kernels_s
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.plan.time.encoder import coupled_pass_s, encoder_plan, item_grid
from k25_train.plan.time.plan_step import plan_step
from k25_train.plan.time.step import StepTimes, decoupled_cost, step_times, vision_times
from parallel.dep.bubbles import TimedItem, plan_bubbles
from parallel.dep.grid import Grid
from parallel.dep.plan import VisionItem, plan_vision
from parallel.pipeline.schedule import RECOMPUTE_AND_BACKWARD_COST
from tests.helpers.trained import trained_vision

REAL = ("experiment=k25_pretrain_4k", "train.global_batch_size=512")
"""32 micro-batches on each replica."""


def planned(share: float, *more: str) -> PipelinePlan:
    return plan_pipeline(compose([*REAL, *more]), assumptions=Assumptions(vision_share=share))


def images_of(pipeline: PipelinePlan) -> list[tuple[int, int]]:
    """(replica, micro-batch) of each image: as many as assumed, in sequences amid those of text."""
    config, assumed = pipeline.config, pipeline.assumptions
    number = assumed.vision_share * config.train.seq_len * pipeline.num_micro_batches / assumed.item_tokens
    per_sequence = round(assumed.media_density * config.train.seq_len / assumed.item_tokens)
    sequences = round(number / per_sequence)
    first = (pipeline.num_micro_batches - sequences) // 2
    return [
        (replica, number)
        for replica in range(config.dp)
        for number in range(first, first + sequences)
        for _ in range(per_sequence)
    ]


def added_by_planner_s(pipeline: PipelinePlan, times: StepTimes) -> float:
    """How much longer the step takes with images, by the planner of idle times."""
    grid = item_grid(pipeline)
    forward_s, copy_s = times.forward_s(grid), times.copy_s(grid)
    backward_s = RECOMPUTE_AND_BACKWARD_COST * forward_s + copy_s
    items = [TimedItem(*place, forward_s + copy_s, backward_s) for place in images_of(pipeline)]
    most = max(Counter(images_of(pipeline)).values()) * pipeline.assumptions.item_tokens
    found = plan_bubbles(
        times.text,
        items,
        pipeline.config.dp,
        num_steps=pipeline.config.model.vision.num_layers,
        exchange_s=times.exchange_s(most),
        gather_s=times.gather_s,
        reduce_s=times.reduce_s,
    )
    return found.start_delay_s + found.end_delay_s


@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
def test_what_fits_into_idle_time_is_what_the_planner_places_there(share: float) -> None:
    pipeline = planned(share, "dep.schedule=bubbles")
    times = step_times(pipeline)
    idle_s = (
        times.text.makespan_s
        - sum(
            times.text.makespan_s - sum(slot.seconds for slot in times.text.slots(stage))
            for stage in range(16)
        )
        / 16
    )
    found = encoder_plan(pipeline, idle_s)
    # Images are not divided without end: the last ones delay the step by one or two.
    image_s = 4 * times.forward_s(item_grid(pipeline))
    assert found.around_s == pytest.approx(added_by_planner_s(pipeline, times), abs=2 * image_s)
    assert found.around_s + found.in_idle_s > 0


def test_what_does_not_fit_delays_the_step() -> None:
    pipeline = planned(0.3, "dep.schedule=bubbles")
    found = [encoder_plan(pipeline, idle_s) for idle_s in (1.0, 0.08, 0.0)]
    work_s = found[0].in_idle_s
    assert found[0].around_s == 0.0
    assert found[1].around_s == pytest.approx(work_s - 0.08)
    # Without any idle time it is all around the pipeline, as upfront.
    assert found[2].around_s + found[2].weights_s >= work_s


def test_ranks_encode_as_many_images_as_the_planner_deals_them() -> None:
    pipeline = planned(0.1)
    config, grid, places = pipeline.config, item_grid(pipeline), images_of(pipeline)
    items = [VisionItem(Grid(1, 2 * 20, 2 * 32), *place) for place in places]
    plan = plan_vision(
        items, config.world_size, decoupled_cost(config), max_patches_per_chunk=16384, split=False
    )
    most = max(Counter(part.rank for part in plan.parts).values())
    found, times = encoder_plan(pipeline, 0.0), vision_times(config)
    image_s = (1 + RECOMPUTE_AND_BACKWARD_COST) * times.forward_s(grid) + 2 * times.copy_s(grid)
    assert found.around_s == pytest.approx(most * image_s, rel=0.5)
    assert found.around_s > most * image_s


def test_a_coupled_tower_is_as_slow_as_the_replica_with_the_most_images() -> None:
    pipeline = planned(0.1, "dep.mode=coupled")
    config, assumed, generator = pipeline.config, pipeline.assumptions, random.Random(1)
    ranks, per_sequence = config.parallelism.ep, assumed.media_density * 4096 / assumed.item_tokens
    has_images = assumed.vision_share / assumed.media_density
    most = [
        max(per_sequence * (generator.random() < has_images) for _ in range(ranks)) for _ in range(20_000)
    ]
    times = vision_times(config)
    cost, grid = encoder_cost(config.model.vision, config.model.hidden_size), item_grid(pipeline)
    image_s = cost.of_item(grid) / times.flops_per_s + times.copy_s(grid)
    forward_s, backward_s = coupled_pass_s(pipeline)
    assert forward_s == pytest.approx(sum(most) / len(most) * image_s, rel=0.02)
    assert forward_s < backward_s < 2 * forward_s


@pytest.mark.parametrize("experiment", ["smoke", "k25_pretrain_4k"])
def test_kernels_of_the_encoder_have_the_flops_of_the_model(experiment: str) -> None:
    config, image = compose([f"experiment={experiment}"]), Grid(1, 10, 14)
    flops = sum(kernel.flops for kernel in encoder_kernels(config, image, 3))
    assert flops == pytest.approx(3 * decoupled_cost(config).of_item(image), rel=1e-9)


@pytest.mark.parametrize("which", ["all", "nothing", "projector"])
def test_an_image_takes_what_its_kernels_take_wherever_the_projector_is(which: str) -> None:
    """A projector that is trained alone is with the first stage, and its kernels with it."""
    config = compose([*REAL, *trained_vision(which)])
    image = Grid(1, 2 * 25, 2 * 25)
    number = config.dep.max_patches_per_chunk // image.num_patches
    chunk_s = kernels_s(encoder_kernels(config, image, number), config.cluster.rates, Precision.bfloat16)
    assert vision_times(config).forward_s(image) == pytest.approx(chunk_s / number, rel=1e-9)


def test_a_frozen_encoder_goes_forward_only() -> None:
    trained, frozen = (
        encoder_plan(planned(0.1, *trained_vision(which)), 0.0) for which in ("all", "nothing")
    )
    assert 0 < frozen.around_s < 0.5 * trained.around_s
    assert frozen.weights_s == 0


def test_a_step_without_images_has_no_encoder() -> None:
    step = plan_step(planned(0.0))
    assert not any(part.cause.name == "encoder" for part in step.parts)
