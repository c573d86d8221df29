"""What images cost in time: throughput of a step with the vision tower relative to that of a text-only step
of as many tokens, at the real 1T shapes, simulated for 256, 1,024 and 4,096 ranks.

    python -m tests.bench.dep_simulation
    python -m tests.bench.dep_simulation_picture        # runs/dep_simulation.png

Each pass is laid out as megatron-core's schedule runs it (parallel/pipeline/schedule.py). Assumed is:

- Text: the configuration `k25_pretrain_4k`, so PP16 x VPP2 x EP16 with overlapping expert exchanges, 16,384
  sequences of 4,096 tokens, each one document. A pass, alone or overlapped, takes what its kernels, exchanges
  and messages do on an H800 (`k25_train/plan/time/passes.py`). Ranks do not differ: no imbalance of experts.
- Tower: its kernels (`k25_train/plan/kernels/encoder.py`); forward once with what leaves no activations,
  later recomputation and backward, together three times forward. Coupled keeps activations and takes twice
  forward instead.
- Items: images of log-normal area, median 0.5 megapixels, sigma 0.8, aspect ratios of log-normal sigma 0.3;
  10 % of the items are chunks of 4 video frames of 0.23 megapixels, sigma 0.3, three to a video. The model's
  own limits on patches. A sample is an image or video with log-normal 150 tokens of text, sigma 1. Sequences
  are packed and blended by the loader's own functions, so one has either text or samples with media.
- Exchange: bfloat16 features and their gradients over the 50 GB/s of a first-stage rank's own NIC. Those of
  one micro-batch are waited for, the others travel while ranks encode; where items are split, upfront waits
  for all gradients.
- Pixels: decoded ahead of time by the host; float32 patches are copied to the GPU at 20 GB/s for each pass.
- Weights of the tower, bfloat16, are gathered from all ranks before its first forward pass and gradients,
  float32, reduced over all ranks after its last backward pass, at 50 GB/s. With bubbles the pipeline goes on
  meanwhile, coupled and upfront wait. The optimizer, and gradients of the language model, are left out.
- Split items (upfront): ranks fetch keys and values of the other parts at 50 GB/s, once in forward, and twice
  as much in backward; nothing of it is hidden.
- Bubbles: passes of an item may be suspended between the tower's 27 layers; each replica's micro-batches are
  in the order of `order_costly_to_middle`. A second table shows bubbles without these.

Bars: upfront 0.985 at 10 % vision tokens; bubbles, for 1,024 ranks and more, 0.995 at 10 % and 0.99 at 30 %.
"""

from __future__ import annotations

import math
import random
import sys
from dataclasses import dataclass, replace
from functools import cache
from heapq import heappop, heappush
from itertools import pairwise
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.config.vision import VisionConfig
from k25_train.data.decode.items import grid_of
from k25_train.data.mix.packing import pack_whole
from k25_train.plan.flops import encoder_cost
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.time.step import StepTimes, encoder_flops_per_s, network_bytes_per_s, step_times
from parallel.dep.bubbles import BubblePlan, TimedItem, order_costly_to_middle, plan_bubbles, work_of
from parallel.dep.grid import Grid
from parallel.dep.plan import VisionItem, VisionPlan, plan_vision
from parallel.pipeline.schedule import RECOMPUTE_AND_BACKWARD_COST
from parallel.pipeline.simulator import simulate
from parallel.pipeline.timeline import Timeline, Work

NODES = (32, 128, 512)
SHARES = (0.1, 0.3)
"""Vision tokens of all tokens."""
KEY_BYTES = 2
SEED = 1
UPFRONT_BAR, BUBBLES_BARS = 0.985, {0.1: 0.995, 0.3: 0.99}

Batch = list[list[Grid]]
"""[sequence of the global batch] -> its items."""


@cache
def build_job(nodes: int, num_micro_batches: int | None = None) -> StepTimes:
    """The real configuration on so many nodes, by default with the micro-batches of its global batch."""
    config = compose(["experiment=k25_pretrain_4k", f"cluster.nodes={nodes}"])
    return step_times(plan_pipeline(config, num_micro_batches))


def of_replicas(job: StepTimes, batch: Batch) -> list[Batch]:
    """[replica][micro-batch] -> items, in contiguous blocks as the loader deals them."""
    size = job.num_micro_batches
    return [batch[first : first + size] for first in range(0, len(batch), size)]


# Items -----------------------------------------------------------------------------------------------------


def draw_batch(config: Config, share: float, num_sequences: int) -> Batch:
    """Items of a global batch of which `share` of the tokens are vision tokens."""
    vision, seq_len, generator = config.model.vision, config.train.seq_len, random.Random(SEED)
    samples = [draw_sample(vision, generator) for _ in range(4 * num_sequences)]
    lengths = [text + sum(grid.num_tokens for grid in grids) for grids, text in samples]
    packed = pack_whole(np.array(lengths), seq_len, SEED)
    rows = np.split(packed.documents, packed.offsets[1:-1])
    with_media = [[grid for document in row for grid in samples[document][0]] for row in rows]
    density = mean(sum(grid.num_tokens for grid in row) for row in with_media) / seq_len
    # As evenly as whole sequences allow.
    counts = np.round(np.arange(num_sequences + 1) * share / density).astype(int)
    return [with_media[count] if after > count else [] for count, after in pairwise(counts.tolist())]


def draw_sample(vision: VisionConfig, generator: random.Random) -> tuple[list[Grid], int]:
    """Items and text tokens of an image with text, or of a video of three chunks of four frames."""
    text = max(1, round(generator.lognormvariate(math.log(150), 1.0)))
    # One video in 28 samples makes 3 items in 30.
    is_video = generator.random() < 1 / 28
    area = generator.lognormvariate(math.log(0.23e6 if is_video else 0.5e6), 0.3 if is_video else 0.8)
    aspect = generator.lognormvariate(0, 0.3)
    width, height = max(28, round(math.sqrt(area * aspect))), max(28, round(math.sqrt(area / aspect)))
    limit = vision.frame_patch_limit if is_video else vision.image_patch_limit
    rows, columns = grid_of(width, height, limit, vision)
    return ([Grid(4, rows, columns)] * 3 if is_video else [Grid(1, rows, columns)]), text


# Ways to run the tower -------------------------------------------------------------------------------------


def coupled_step_s(job: StepTimes, batch: Batch) -> float:
    """The tower runs before the first chunk, and a group of replicas that exchange tokens waits for the
    one of them with the most to encode."""
    group = job.config.parallelism.ep
    replicas, first = of_replicas(job, batch), job.text.schedules[0]
    makespans = []
    for start in range(0, len(replicas), group):
        most_s = [
            max(sum(map(job.forward_s, items)) + sum(map(job.copy_s, items)) for items in together)
            for together in zip(*replicas[start : start + group], strict=True)
        ]
        before: dict[tuple[int, int], list[Work]] = {}
        for position, each in enumerate(first):
            if each.vp_stage == 0:
                seconds = most_s[each.micro_batch] * (1 if each.is_forward else 2)
                work = Work(each.is_forward, 0, each.micro_batch, seconds)
                before.setdefault((0, position + (not each.is_forward)), []).append(work)
        makespans.append(simulate(job.text.schedules, job.seconds, before=before).makespan_s)
    return max(makespans) + job.gather_s + job.reduce_s


@dataclass(frozen=True, slots=True)
class Upfront:
    """Seconds of the phases around the pipeline."""

    forward_s: float
    backward_s: float
    exchange_s: float
    """Of features and gradients, as far as ranks wait for them."""
    mean_s: float
    """Forward and backward, of the mean rank."""


def upfront(job: StepTimes, batch: Batch, *, split: bool) -> Upfront:
    """All ranks encode an equal share before the pipeline starts, and go backward when it is done."""
    items = [
        VisionItem(grid, replica, number)
        for replica, of_replica in enumerate(of_replicas(job, batch))
        for number, grids in enumerate(of_replica)
        for grid in grids
    ]
    model = job.config.model
    cost = encoder_cost(model.vision, model.hidden_size)
    copied = round(job.copy_s(Grid(1, 1, 1)) * encoder_flops_per_s(job.config))
    cost = replace(cost, per_patch=cost.per_patch + copied)
    num_ranks = job.config.world_size
    limit = model.vision.image_patch_limit
    plan = plan_vision(items, num_ranks, cost, max_patches_per_chunk=limit, split=split)
    forward_s, backward_s = [0.0] * num_ranks, [0.0] * num_ranks
    for part in plan.parts:
        grid = plan.items[part.item].grid_thw
        rows = part.num_rows / grid.h
        computed_s, copied_s, fetched_s = rows * job.forward_s(grid), rows * job.copy_s(grid), 0.0
        if rows < 1:
            fetched_s = keys_s(job, plan, part.item, part.num_patches)
        forward_s[part.rank] += computed_s + copied_s + fetched_s
        backward_s[part.rank] += RECOMPUTE_AND_BACKWARD_COST * computed_s + copied_s + 2 * fetched_s
    most_tokens = max(
        sum(grid.num_tokens for grids in each for grid in grids) for each in of_replicas(job, batch)
    )
    both_s = mean(forward_s) + mean(backward_s)
    of_one_s = job.exchange_s(
        max(sum(grid.num_tokens for grid in grids) for each in of_replicas(job, batch) for grids in each)
    )
    of_all_s = job.exchange_s(most_tokens)
    exchange_s = sum(
        of_one_s + max(0.0, of_all_s - busiest_s) for busiest_s in (max(forward_s), max(backward_s))
    )
    if plan.is_split:
        exchange_s += of_all_s - of_one_s
    return Upfront(max(forward_s), max(backward_s), exchange_s, both_s)


def keys_s(job: StepTimes, plan: VisionPlan, item: int, own_patches: int) -> float:
    """Seconds in which a rank fetches keys and values of the other parts of an item, in all layers."""
    vision = job.config.model.vision
    others = plan.items[item].num_patches - own_patches
    return others * 2 * vision.hidden_size * KEY_BYTES * vision.num_layers / network_bytes_per_s(job.config)


class Bubbles(NamedTuple):
    """A step whose tower runs where ranks are idle."""

    plan: BubblePlan
    before: dict[tuple[int, int], list[Work]]
    run: Timeline
    more_s: float
    """How much longer than without a tower it takes."""
    queue_s: float
    """The most by which features reach their first stage late, for others before them."""


def bubbles(
    job: StepTimes,
    batch: Batch,
    *,
    num_steps: int | None = None,
    is_calm: bool = True,
    hides_weights: bool = True,
) -> Bubbles:
    """Plan the step, and simulate all replicas to confirm it."""
    items, tokens = place_items(job, batch, is_calm)
    num_steps = num_steps or job.config.model.vision.num_layers
    exchange_s, replicas = job.exchange_s(max(tokens.values())), job.config.dp
    around = {"gather_s": job.gather_s, "reduce_s": job.reduce_s} if hides_weights else {}
    plan = plan_bubbles(job.text, items, replicas, num_steps=num_steps, exchange_s=exchange_s, **around)
    before = work_of(items, plan.placements, num_steps)
    lists = job.text.schedules
    run = simulate(lists, job.seconds, before=before, exchange_s=exchange_s, num_replicas=replicas)
    planned_s = plan.start_delay_s + job.text.makespan_s + plan.end_delay_s
    assert run.makespan_s <= planned_s + 1e-6, "the simulated step takes longer than planned"
    more_s = plan.start_delay_s + plan.end_delay_s + (0.0 if hides_weights else job.gather_s + job.reduce_s)
    return Bubbles(plan, before, run, more_s, queueing_s(job, run, before, tokens))


def place_items(
    job: StepTimes, batch: Batch, is_calm: bool
) -> tuple[list[TimedItem], dict[tuple[int, int], int]]:
    """Items by replica and place of their micro-batch; and vision tokens by (replica, place)."""
    items: list[TimedItem] = []
    tokens: dict[tuple[int, int], int] = {}
    for replica, of_replica in enumerate(of_replicas(job, batch)):
        order = list(range(len(of_replica)))
        if is_calm:
            order = order_costly_to_middle(
                [max(map(job.forward_s, grids), default=0.0) for grids in of_replica]
            )
        for place, number in enumerate(order):
            for grid in of_replica[number]:
                forward_s, copy_s = job.forward_s(grid), job.copy_s(grid)
                backward_s = RECOMPUTE_AND_BACKWARD_COST * forward_s + copy_s
                items.append(TimedItem(replica, place, forward_s + copy_s, backward_s))
                tokens[replica, place] = tokens.get((replica, place), 0) + grid.num_tokens
    return items, tokens


def queueing_s(
    job: StepTimes,
    run: Timeline,
    before: dict[tuple[int, int], list[Work]],
    tokens: dict[tuple[int, int], int],
) -> float:
    """The most by which a micro-batch's features are late, each sent when the last of them is there, the most
    urgent first, all through one NIC."""
    ready_s: dict[tuple[int, int], float] = {}
    for place, works in before.items():
        for work, start_s in zip(works, run.work_starts_s[place], strict=True):
            if work.is_forward:
                key = work.replica, work.micro_batch
                ready_s[key] = max(ready_s.get(key, 0.0), start_s + work.seconds)
    starts_s = run.feature_deadlines_s()
    late_s = 0.0
    for replica in range(job.config.dp):
        coming = sorted((at_s, number) for (owner, number), at_s in ready_s.items() if owner == replica)
        queue: list[tuple[float, float]] = []
        now_s = 0.0
        while coming or queue:
            if not queue:
                now_s = max(now_s, coming[0][0])
            while coming and coming[0][0] <= now_s:
                number = coming.pop(0)[1]
                heappush(queue, (starts_s[number], job.exchange_s(tokens[replica, number])))
            deadline_s, seconds = heappop(queue)
            now_s += seconds
            late_s = max(late_s, now_s - deadline_s)
    return late_s


# Figures ---------------------------------------------------------------------------------------------------

TIMES = (
    "text-only step", "idle of a rank", "tower of a rank", "upfront: busiest", "exchange", "weights",
    "bubbles: start", "end", "late features",
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "items whole": {"num_steps": 1},
    "batch as drawn": {"is_calm": False},
    "weights waited for": {"hides_weights": False},
}


def main() -> None:
    """Print the figures and the bars; exits non-zero if a bar is missed."""
    case = ("ranks", "vision tokens")
    shares = Table(*case, "coupled", "upfront", "split", "bubbles", "bars", title="text-only step = 1")
    times = Table(*case, *TIMES, title="milliseconds per step; per rank: mean")
    without = Table(*case, *VARIANTS, title="bubbles, text-only step = 1")
    kept = True
    for nodes in NODES:
        for share in SHARES:
            job = build_job(nodes)
            batch = draw_batch(job.config, share, job.config.train.global_batch_size)
            row = f"{job.config.world_size:,}", f"{share:.0%}"
            filled = {name: bubbles(job, batch, **options) for name, options in VARIANTS.items()}
            kept &= add_rows(job, batch, share, row, filled["all"], shares, times)
            ratios = (ratio(job, each.more_s) for each in filled.values())
            without.add_row(*row, *(f"{each:.4f}" for each in ratios))
    for table in (shares, times, without):
        Console(width=120).print(table)
    sys.exit(not kept)


def add_rows(
    job: StepTimes,
    batch: Batch,
    share: float,
    row: tuple[str, str],
    filled: Bubbles,
    shares: Table,
    times: Table,
) -> bool:
    """Add what one case comes to; whether its bars are kept."""
    text_s, around_s = job.text.makespan_s, job.gather_s + job.reduce_s
    whole, parts = (upfront(job, batch, split=split) for split in (False, True))
    whole_ratio, parts_ratio = (
        ratio(job, each.forward_s + each.backward_s + each.exchange_s + around_s) for each in (whole, parts)
    )
    filled_ratio = ratio(job, filled.more_s)
    bars = []
    if share == SHARES[0]:
        bars.append(("upfront", max(whole_ratio, parts_ratio), UPFRONT_BAR))
    if job.config.world_size >= 1024:
        bars.append(("bubbles", filled_ratio, BUBBLES_BARS[share]))
    verdicts = [f"{name} {bar} {'kept' if found >= bar else 'MISSED'}" for name, found, bar in bars]
    ratios = text_s / coupled_step_s(job, batch), whole_ratio, parts_ratio, filled_ratio
    shares.add_row(*row, *(f"{each:.4f}" for each in ratios), ", ".join(verdicts))
    stages = range(job.config.parallelism.pp)
    idle_s = mean(sum(slot.seconds for slot in job.text.slots(stage)) for stage in stages)
    busiest_s = min(whole.forward_s + whole.backward_s, parts.forward_s + parts.backward_s)
    figures_s = (
        text_s, idle_s, whole.mean_s, busiest_s, whole.exchange_s, around_s, filled.plan.start_delay_s,
        filled.plan.end_delay_s, filled.queue_s,
    )  # fmt: skip
    times.add_row(*row, *(f"{1e3 * each:,.0f}" for each in figures_s))
    return all(found >= bar for _, found, bar in bars)


def ratio(job: StepTimes, more_s: float) -> float:
    """Throughput, relative to the text-only step, of a step that takes so much longer."""
    return job.text.makespan_s / (job.text.makespan_s + more_s)


if __name__ == "__main__":
    main()
