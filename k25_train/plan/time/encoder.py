"""What images cost in time: a tower coupled, around the pipeline, or in its idle time; torch-free.

All images are alike (`Assumptions.item_tokens`), so what ranks encode differs by whole images at most. The
planners (`vision_planner.py`) place the real images of each step; a test compares.
"""

import math
from dataclasses import dataclass

from k25_train.plan.batch_sizes import BatchSizes, causal_pairs
from k25_train.plan.flops import encoder_cost
from k25_train.plan.pipeline import PipelinePlan
from k25_train.plan.time.step import VisionTimes, vision_times
from parallel.config import DepSchedule
from parallel.dep.grid import MERGE_EDGE, Grid
from parallel.pipeline.schedule import BACKWARD_COST, RECOMPUTE_AND_BACKWARD_COST


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderPlan:
    """What a decoupled encoder adds to a step, in seconds."""

    around_s: float
    """Before and after the pipeline: images, their pixels, features on their way."""
    in_idle_s: float
    """In the idle time of the pipeline, on the mean rank."""
    weights_s: float
    """Until its weights are gathered and its gradients reduced."""
    how: str
    """What it is computed from."""


NO_ENCODER = EncoderPlan(around_s=0.0, in_idle_s=0.0, weights_s=0.0, how="")


def step_sizes(pipeline: PipelinePlan) -> BatchSizes:
    """The sums of a step's global batch, as assumed."""
    config, assumed = pipeline.config, pipeline.assumptions
    documents = pipeline.stages[0].balanced_sizes.documents
    num_tokens = config.train.global_batch_size * config.train.seq_len
    num_vision_tokens, patches = round(assumed.vision_share * num_tokens), item_grid(pipeline).num_patches
    num_items = num_vision_tokens / item_tokens(pipeline)
    return BatchSizes(
        num_tokens=num_tokens,
        num_token_pairs=causal_pairs(documents) * num_tokens // sum(documents),
        num_items=math.ceil(num_items),
        num_vision_tokens=num_vision_tokens,
        num_patches=num_vision_tokens * MERGE_EDGE**2,
        num_patch_pairs=round(num_items * patches**2),
    )


def item_tokens(pipeline: PipelinePlan) -> int:
    """Vision tokens of an image: as assumed, but no more than the model takes, or a sequence has."""
    config, assumed = pipeline.config, pipeline.assumptions
    of_model = config.model.vision.image_patch_limit // MERGE_EDGE**2
    of_sequence = round(assumed.media_density * config.train.seq_len)
    return max(1, min(assumed.item_tokens, of_model, of_sequence))


def item_grid(pipeline: PipelinePlan) -> Grid:
    """Patches of an image: one row of tokens, since only their number counts."""
    return Grid(1, MERGE_EDGE, MERGE_EDGE * item_tokens(pipeline))


def coupled_pass_s(pipeline: PipelinePlan) -> tuple[float, float]:
    """What a coupled tower adds to a forward and to a backward pass of the first chunk, on average.

    A sequence has images, as many as `media_density` says, or none. Replicas that exchange tokens with each
    other wait for the one that encodes the most.
    """
    config, assumed = pipeline.config, pipeline.assumptions
    if config.vision_placement.encoder_parts or not assumed.vision_share:
        return 0.0, 0.0
    times, grid = vision_times(config), item_grid(pipeline)
    model = config.model
    item_s = encoder_cost(model.vision, model.hidden_size).of_item(grid) / times.flops_per_s
    density = max(assumed.media_density, assumed.vision_share)
    sizes = config.parallelism
    sequences = max(1.0, config.train.micro_batch_size * sizes.ep / sizes.cp)
    share_with_images = 1 - (1 - assumed.vision_share / density) ** sequences
    items = density * config.train.seq_len / sizes.cp / item_tokens(pipeline) * share_with_images
    forward_s = items * (item_s + times.copy_s(grid))
    trained = config.vision_placement.trained_parts
    return forward_s, BACKWARD_COST * items * item_s if trained else 0.0


def encoder_plan(pipeline: PipelinePlan, idle_s: float) -> EncoderPlan:
    """What a decoupled encoder adds to a step.

    Args:
        pipeline: what is planned.
        idle_s: how long ranks are idle while passes run, on average over stages.
    """
    config, assumed = pipeline.config, pipeline.assumptions
    if not config.vision_placement.encoder_parts or not assumed.vision_share:
        return NO_ENCODER
    # 1. One image, either pass, and how many there are.
    times, grid = vision_times(config), item_grid(pipeline)
    forward_s, copy_s = times.forward_s(grid), times.copy_s(grid)
    is_trained = bool(config.vision_placement.trained_encoder_parts)
    backward_s = (RECOMPUTE_AND_BACKWARD_COST * forward_s + copy_s) * is_trained
    num_items = (
        assumed.vision_share * config.train.global_batch_size * config.train.seq_len / item_tokens(pipeline)
    )
    of_rank = num_items / config.world_size
    # 2. Around the pipeline, where all ranks wait for those of a slow node.
    more = assumed.slow_node - 1
    upfront = _upfront_s(
        pipeline,
        times,
        (1 + more) * forward_s + copy_s,
        backward_s + more * RECOMPUTE_AND_BACKWARD_COST * forward_s * is_trained,
        of_rank,
    )
    weights_s = times.gather_s + times.reduce_s
    if config.dep.schedule is DepSchedule.upfront:
        how = f"{of_rank:,.1f} images per rank before the pipeline, and again with backward after it"
        return EncoderPlan(around_s=upfront, in_idle_s=0.0, weights_s=weights_s, how=how)
    # 3. In bubbles, what idle time takes up; the rest is spread over all ranks. Where that would be longer,
    #    all of it goes around the pipeline, as `plan_bubbles` does.
    work_s = of_rank * (forward_s + copy_s + backward_s)
    rest_s = max(0.0, work_s - idle_s)
    how = f"{of_rank:,.1f} images per rank, {min(1.0, idle_s / work_s):.0%} of them in idle time"
    in_idle_s = work_s - rest_s
    if rest_s > upfront + weights_s:
        return EncoderPlan(around_s=upfront, in_idle_s=0.0, weights_s=weights_s, how=how)
    return EncoderPlan(around_s=rest_s, in_idle_s=in_idle_s, weights_s=0.0, how=how)


def _upfront_s(
    pipeline: PipelinePlan, times: VisionTimes, forward_s: float, backward_s: float, num_images: float
) -> float:
    """Both phases around the pipeline, of ranks with so many images each."""
    config, assumed = pipeline.config, pipeline.assumptions
    # 1. Images are encoded whole, unless ranks share the rows of one.
    most = num_images if config.dep.split_items else math.ceil(num_images)
    # 2. Features and their gradients travel while ranks encode, all but those of one micro-batch.
    train, density = config.train, max(assumed.media_density, assumed.vision_share)
    of_micro_batch = train.micro_batch_size * train.seq_len / config.parallelism.cp
    tokens = of_micro_batch * pipeline.num_micro_batches
    all_s = times.exchange_s(round(assumed.vision_share * tokens))
    one_s = times.exchange_s(round(density * of_micro_batch))
    phases = (forward_s, backward_s) if backward_s else (forward_s,)
    return sum(most * each + one_s + max(0.0, all_s - most * each) for each in phases)
