"""The decoupled encoder's plan: how evenly images are spread over ranks, and how long planning takes.

    python -m tests.bench.dep_balance [OVERRIDE ...]

Global batches are drawn for the real 1T model, 16,384 sequences at 256 and 4,096 ranks, with sizes that the
released preprocessor's limits make of images and videos, and are the first ones of the smoke set. Imbalance
is the most over the mean of all ranks' FLOPs in tower and projector:

    largest       one rank with nothing but the costliest item: no plan of whole items is below that
    whole         every item on one rank
    split         items may be split by rows (`dep.split_items`)
    waits         the same, counting that the ranks of a split item wait for one another in every layer; the
                  time that keys and values take to arrive is not counted
    in turn       item i on rank i modulo the number of ranks
    stage 0       coupled: each replica's items on its first pipeline stage

The bar is for the real model, where whole items may miss it only by what the largest costs.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

from rich.console import Console
from rich.table import Table

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.data.decode.items import plan_items
from k25_train.data.formats.frame_times import FrameTimes
from k25_train.data.formats.records import MediaSegment
from k25_train.data.loader import DataLoader
from k25_train.plan.flops import encoder_cost
from parallel.dep.cost import EncoderCost
from parallel.dep.plan import VisionItem, VisionPlan, plan_vision

NODES = (32, 512)
"""Of 8 GPUs: 256 and 4,096 ranks."""
SMOKE = ((4, 8), (16, 128), (64, 512))
"""(ranks, sequences in the global batch); the smoke run itself is the first."""
BAR = 1.02
NUM_RUNS = 5
"""Of which the fastest counts: others of this machine only ever make one slower."""

DRAWN = {"mixed": (0.1, 5), "images": (0.0, 5), "few images": (0.0, 1)}
"""Name -> (share of sequences with a video, most images in each other sequence)."""
IMAGE_PIXELS, AREA_SPREAD, ASPECT_SPREAD = 600 * 600, 1.0, 0.4
"""Median area, and standard deviations of the logarithms of area and aspect ratio."""
VIDEO_SIZES = ((640, 360), (1280, 720), (1920, 1080), (1080, 1920))
LONGEST_VIDEO_S = 32


def main() -> None:
    """Print the table; ends non-zero if the bar is missed."""
    table = Table("batch", title=f"encoder's FLOPs, most / mean over ranks, bar {BAR:.2f}")
    for name in "ranks|items|largest|whole|split|waits|items split|in turn|stage 0|s whole|s split".split(
        "|"
    ):
        table.add_column(name, justify="right")
    kept = True
    for nodes in NODES:
        config = compose(["experiment=k25_pretrain_4k", f"cluster.nodes={nodes}", *sys.argv[1:]])
        for name, (video_share, most_images) in DRAWN.items():
            items = drawn_items(config, video_share, most_images)
            kept &= add_row(table, name, config, config.world_size, items)
    table.add_section()
    if Path("datasets/smoke/dataset.json").exists():
        for num_ranks, num_sequences in SMOKE:
            config = compose(["experiment=smoke", f"train.global_batch_size={num_sequences}", *sys.argv[1:]])
            replicas = num_ranks // config.parallelism.pp
            add_row(table, "smoke set", config, num_ranks, smoke_items(config, replicas))
    Console(width=118).print(table)
    print(f"bar {BAR:.2f}: {'kept' if kept else 'MISSED'}")
    sys.exit(not kept)


def drawn_items(config: Config, video_share: float, most_images: int) -> list[VisionItem]:
    """A global batch of sequences that each have a video or up to so many images; sizes from a fixed seed."""
    rng = random.Random(0)
    share = config.train.global_batch_size // config.dp
    return [
        VisionItem(item.grid_thw, number // share, number % share // config.train.micro_batch_size)
        for number in range(config.train.global_batch_size)
        for segment in drawn_media(rng, video_share, most_images)
        for item in plan_items(segment, config.model.vision)
    ]


def drawn_media(rng: random.Random, video_share: float, most_images: int) -> Iterator[MediaSegment]:
    """The media of one sequence."""
    if rng.random() < video_share:
        width, height = rng.choice(VIDEO_SIZES)
        yield segment_of("video", width, height, max(1, int(30 * rng.uniform(1, LONGEST_VIDEO_S))))
        return
    for _ in range(rng.randint(0, most_images)):
        area = IMAGE_PIXELS * math.exp(rng.gauss(0, AREA_SPREAD))
        aspect = math.exp(rng.gauss(0, ASPECT_SPREAD))
        yield segment_of("image", round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect)))


def segment_of(kind: str, width: int, height: int, num_frames: int = 1) -> MediaSegment:
    """A file of this size that lies nowhere; a video has 30 frames per second."""
    times = FrameTimes.even(num_frames, Fraction(1, 30))
    is_video = kind == "video"
    return MediaSegment(
        type=kind,
        shard="",
        offset=0,
        num_bytes=0,
        format="",
        width=width,
        height=height,
        num_frames=num_frames,
        duration_s=times.duration_s if is_video else 0.0,
        frame_times=str(times) if is_video else "",
    )


def smoke_items(config: Config, num_replicas: int) -> list[VisionItem]:
    """The items of the smoke set's first global batch."""
    with DataLoader(config.data, config.train, config.model.vision) as loader:
        sequences = loader.plan(0).sequences
    share = len(sequences) // num_replicas
    return [
        VisionItem(item.grid_thw, number // share, number % share // config.train.micro_batch_size)
        for number, sequence in enumerate(sequences)
        for item in sequence.items
    ]


def add_row(table: Table, name: str, config: Config, num_ranks: int, items: Sequence[VisionItem]) -> bool:
    """Plan a batch with and without splits; whether the bar is kept."""
    cost = encoder_cost(config.model.vision, config.model.hidden_size)
    whole, whole_s = timed_plan(config, items, num_ranks, cost, split=False)
    split, split_s = timed_plan(config, items, num_ranks, cost, split=True)
    costs = [cost.of_item(item.grid_thw) for item in items]
    mean = sum(costs) / num_ranks
    round_robin, stage_0 = [0] * num_ranks, [0] * num_ranks
    for number, item in enumerate(items):
        round_robin[number % num_ranks] += costs[number]
        stage_0[item.replica] += costs[number]
    largest = max(costs) / mean
    figures = [largest, whole.imbalance, split.imbalance, with_waits(split, costs) / mean]
    num_split = sum(len(split.parts_of(number)) > 1 for number in range(len(items)))
    table.add_row(
        name,
        f"{num_ranks:,}",
        f"{len(items):,}",
        *(f"{figure:.3f}" for figure in figures),
        f"{num_split:,}",
        f"{max(round_robin) / mean:.2f}",
        f"{max(stage_0) / mean:.2f}",
        f"{whole_s:.3f}",
        f"{split_s:.3f}",
    )
    return whole.imbalance <= max(BAR, largest) and split.imbalance <= BAR


def timed_plan(
    config: Config, items: Sequence[VisionItem], num_ranks: int, cost: EncoderCost, *, split: bool
) -> tuple[VisionPlan, float]:
    """The plan, and the seconds that it takes one core."""
    limit = config.dep.max_patches_per_chunk
    times = []
    for _ in range(NUM_RUNS):
        start = time.process_time()
        plan = plan_vision(items, num_ranks, cost, max_patches_per_chunk=limit, split=split)
        times.append(time.process_time() - start)
    return plan, min(times)


def with_waits(plan: VisionPlan, costs: Sequence[int]) -> float:
    """When the last rank is done, if the ranks of a split item begin it and end it together."""
    clock = [0.0] * plan.num_ranks
    parts = [plan.parts_of(number) for number in range(len(plan.items))]
    # The order in which all ranks take split items, and then whole ones.
    for number in sorted(range(len(parts)), key=lambda number: (len(parts[number]) == 1, costs[number])):
        most_rows = max(part.num_rows for part in parts[number])
        start = max(clock[part.rank] for part in parts[number])
        for part in parts[number]:
            clock[part.rank] = start + costs[number] * most_rows / plan.items[number].grid_thw[1]
    return max(clock)


if __name__ == "__main__":
    main()
