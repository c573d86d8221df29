"""Items that several ranks encode together: the exchange, the engine, and training, against one process."""

import itertools
import logging
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from k25_train.data.decode.frames import MediaInfo
from k25_train.model.moonvit import MoonViT3D
from k25_train.model.moonvit_items import ItemPart
from parallel.dep.cost import EncoderCost
from parallel.dep.grid import Grid
from parallel.dep.plan import VisionItem, VisionPlan, plan_vision
from parallel.dep.transfers import Receiver, transfers_of
from tests.helpers.held_rows import made_up_runs
from tests.helpers.hf_reference import tiny_vision_config
from tests.helpers.parity import NARROW, TOLERANCE, worst_difference
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run
from tests.helpers.smoke_mix import mix
from tests.helpers.tiny_shards import Media, Sample, make_image, make_video, write_shard_set
from tests.helpers.toy_encoder import Taken, engine_setup, loss_of, put_together, take

pytestmark = pytest.mark.distributed

NUM_RANKS, NUM_REPLICAS, NUM_MICRO_BATCHES = 4, 2, 2
WIDTH = 4 * 48
COST = EncoderCost(per_patch=10, per_pair=1)
SMALL, PAGE, VIDEO = Grid(1, 4, 4), Grid(1, 22, 14), Grid(3, 14, 6)

BATCHES: dict[str, list[VisionItem]] = {
    "one image": [VisionItem(PAGE, 1, 1)],
    "one video": [VisionItem(VIDEO, 0, 0)],
    "an image above a rank's share": [
        VisionItem(SMALL, 0, 0),
        VisionItem(PAGE, 0, 1),
        *[VisionItem(SMALL, 1, n) for n in (0, 1, 1)],
    ],
    "several share ranks": [
        VisionItem(Grid(1, 14, 8), 0, 0),
        VisionItem(VIDEO, 0, 1),
        VisionItem(SMALL, 0, 1),
        VisionItem(PAGE, 1, 0),
        VisionItem(Grid(2, 10, 8), 1, 1),
        VisionItem(SMALL, 1, 1),
    ],
}


class Tower(MoonViT3D):
    """The vision tower, its merged neighbours as one row of `WIDTH` features."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__(tiny_vision_config())
        with torch.no_grad():
            for block in self.encoder.blocks:
                block.wqkv.weight.mul_(2)  # so that attention tells keys apart

    def forward(
        self, pixels: Tensor, grid_thw: Sequence[tuple[int, int, int]], part: ItemPart | None = None
    ) -> Tensor:
        return super().forward(pixels, grid_thw, part).flatten(1)


def pixels_of(item: int, grid: tuple[int, int, int]) -> Tensor:
    """[t, h, w, 588]."""
    return torch.randn(*grid, 588, generator=torch.Generator().manual_seed(item))


def join(context: RankContext) -> None:
    from parallel.topology import start_process_group

    os.environ.update(context.environment())
    start_process_group(torch.device("cpu"), 60.0)


def plan_of(items: Sequence[VisionItem]) -> VisionPlan:
    return plan_vision(items, NUM_RANKS, COST, max_patches_per_chunk=100, split=True)


class Found(NamedTuple):
    """Of one rank, or of one process that has everything."""

    features: dict[tuple[int, int], Taken]
    """By replica and micro-batch."""
    gradients: list[Tensor]
    stats: Any = None


def alone(items: Sequence[VisionItem]) -> Found:
    """What one process finds that encodes each item whole."""
    tower, features = Tower(), {}
    for place in itertools.product(range(NUM_REPLICAS), range(NUM_MICRO_BATCHES)):
        own = [number for number, item in enumerate(items) if (item.replica, item.micro_batch) == place]
        if own:
            grids = [items[number].grid_thw for number in own]
            pixels = torch.cat([pixels_of(*each).flatten(0, 2) for each in zip(own, grids, strict=True)])
            features[place] = tower(pixels, grids)
            loss_of(features[place], *place).backward()
    gradients = [each.grad for each in tower.parameters() if each.grad is not None]
    taken = {place: Taken(torch.arange(len(value)), value.detach()) for place, value in features.items()}
    return Found(taken, gradients)


def together(context: RankContext) -> dict[tuple[int, str], Found]:
    """What one rank finds, batch after batch, where replicas have one rank in the first stage, or two."""
    join(context)
    group = dist.new_group()
    return {
        (cp, name): batch_on(context.rank, group, items, cp)
        for cp in (1, 2)
        for name, items in BATCHES.items()
    }


def batch_on(rank: int, group: dist.ProcessGroup, items: Sequence[VisionItem], cp: int) -> Found:
    from parallel.dep.engine import VisionWork
    from parallel.dep.feature_exchange import FeatureExchange
    from parallel.dep.part_exchange import PartExchange
    from parallel.dep.upfront_engine import UpfrontEngine
    from parallel.dep.vision_pass import Chunk

    tower, device = Tower(), torch.device("cpu")
    exchange = FeatureExchange(
        group,
        group,
        range(NUM_REPLICAS * cp),
        width=WIDTH,
        wire_dtype=torch.float32,
        device=device,
        phase=lambda *_: nullcontext(),
    )
    parts = PartExchange(group, phase=lambda *_: nullcontext())
    engine = UpfrontEngine(engine_setup(exchange, True), tower, parts)
    plan = plan_of(items)
    chunks = []
    for numbers in plan.chunks[rank]:
        of_chunk = [plan.parts[number] for number in numbers]
        grids = tuple(items[part.item].grid_thw for part in of_chunk)
        pixels = [
            pixels_of(part.item, grid)[:, part.row : part.row + part.num_rows].flatten(0, 2)
            for part, grid in zip(of_chunk, grids, strict=True)
        ]
        chunks.append(Chunk(torch.cat(pixels), grids))
    runs, replica = made_up_runs(items, cp), rank // cp if exchange.is_first_stage else None
    own = transfers_of(plan, Receiver(rank, replica, NUM_MICRO_BATCHES, runs))
    engine.start(VisionWork(plan, chunks, own))
    features = {}
    for micro_batch in range(NUM_MICRO_BATCHES if replica is not None else 0):
        taken = take(engine, place := (replica, micro_batch), runs, rank)
        if taken is not None:
            leaf, features[place] = taken
            loss_of(leaf, *place, features[place].rows).backward()
    engine.finish()
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in tower.parameters()]
    return Found(features, gradients, engine.stats)


def test_ranks_that_share_items_are_one_process() -> None:
    ranks = run_ranks(together, NUM_RANKS)
    for cp, name in ranks[0]:
        items = BATCHES[name]
        expected, by_rank = alone(items), [rank[cp, name] for rank in ranks]
        found = put_together([rank.features for rank in by_rank])
        assert found.keys() == expected.features.keys()
        for place, features in found.items():
            whole = expected.features[place].features
            assert (features - whole).norm() / whole.norm() <= 1e-6, name
        for number, gradient in enumerate(expected.gradients):
            summed = torch.stack([rank.gradients[number] for rank in by_rank]).sum(dim=0)
            assert (summed - gradient).norm() <= 1e-5 * gradient.norm(), name
        assert sum(rank.stats.num_patches for rank in by_rank) == sum(item.num_patches for item in items)
        assert sum(rank.stats.split_bytes for rank in by_rank) == bytes_between_parts(plan_of(items))


def bytes_between_parts(plan: VisionPlan) -> int:
    """Keys and values in float32, of each of 3 layers: twice forward, and once their gradients."""
    found = 0
    for item in range(len(plan.items)):
        others = len(plan.parts_of(item)) - 1
        found += 3 * 3 * others * plan.items[item].num_patches * 2 * 48 * 4
    return found


def test_the_batches_have_what_could_go_wrong() -> None:
    sharing = {
        name: [{part.rank for part in plan_of(items).parts_of(item)} for item in range(len(items))]
        for name, items in BATCHES.items()
    }
    for ranks in sharing.values():
        assert any(len(of_item) > 1 for of_item in ranks)
    split = [of_item for of_item in sharing["several share ranks"] if len(of_item) > 1]
    assert len(split) >= 3
    assert any(a & b and a != b for a, b in itertools.combinations(split, 2))
    rows = {part.num_rows for part in plan_of(BATCHES["one image"]).parts}
    assert len(rows) > 1, "parts of different sizes"


def gathered_on(context: RankContext, sizes: Sequence[int]) -> tuple[Tensor, Tensor, int]:
    """What a rank gathers, the gradient of its own block, and the bytes that it sent."""
    from parallel.dep.part_exchange import PartExchange, PartOfItem

    join(context)
    exchange = PartExchange(dist.new_group(), phase=lambda *_: nullcontext())
    # Parts need not be in the order of ranks.
    ranks = tuple(reversed(range(context.world_size)))
    index = ranks.index(context.rank)
    part = PartOfItem(row=0, num_rows=0, index=index, ranks=ranks, sizes=tuple(sizes), exchange=exchange)
    own = block(index, sizes[index]).requires_grad_()
    gathered = part.gather(own)
    with torch.no_grad():
        assert torch.equal(part.gather(own), gathered)
    loss_at(index, gathered).backward()
    assert own.grad is not None
    return gathered.detach(), own.grad, exchange.sent_bytes


def block(index: int, size: int) -> Tensor:
    return torch.randn(size, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(index))


def loss_at(index: int, gathered: Tensor) -> Tensor:
    """Another loss on every rank, which is not linear."""
    generator = torch.Generator().manual_seed(50 + index)
    weights = torch.randn(gathered.shape, dtype=torch.float64, generator=generator)
    return (weights * gathered.sin()).sum().square()


@pytest.mark.parametrize("sizes", [(2, 3), (4, 1, 2)])
def test_gathering_sends_gradients_back(sizes: tuple[int, ...]) -> None:
    found = run_ranks(gathered_on, len(sizes), sizes)[::-1]
    blocks = [block(index, size).requires_grad_() for index, size in enumerate(sizes)]
    total = sum(loss_at(index, torch.cat(blocks)) for index in range(len(sizes)))
    expected = torch.autograd.grad(total, blocks)
    for index, (gathered, gradient, sent_bytes) in enumerate(found):
        assert torch.equal(gathered, torch.cat(blocks))
        torch.testing.assert_close(gradient, expected[index], rtol=1e-13, atol=1e-13)
        others = len(sizes) - 1
        gradients_of_others = sum(sizes) - sizes[index]
        assert sent_bytes == (2 * others * sizes[index] + gradients_of_others) * 2 * 3 * 8


def train_and_evaluate(
    context: RankContext, arguments: Sequence[str]
) -> tuple[list[tuple[float, float]], Any]:
    """Loss and gradient norm of each step, the evaluation last, and the bytes between parts by step."""
    from k25_train.training.evaluation import eval_losses
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    with run.data:
        steps = [train_step(run, step) for step in range(1, run.config.train.steps + 1)]
        evaluation = sum(eval_losses(run, 8).values())
    losses = [(step.loss, step.grad_norm) for step in steps]
    # Coupled, there is no summary.
    return [*losses, (evaluation, evaluation)], [getattr(step.vision, "split_bytes", 0) for step in steps]


def test_training_with_split_items_is_training_in_one_process(data: Path, tmp_path: Path) -> None:
    few = "train.steps=6 optim.warmup=2 optim.decay=2 train.global_batch_size=4".split()
    arguments = overrides(data, tmp_path, *NARROW, *few)
    alone = [*arguments, *layout(), "dep.mode=coupled"]
    split = [*arguments, *layout(pp=2, dp=2), "dep.split_items=true"]
    [(expected, _)] = run_ranks(train_and_evaluate, 1, alone)
    by_rank = run_ranks(train_and_evaluate, 4, split)
    assert all(losses == by_rank[0][0] for losses, _ in by_rank)
    found, split_bytes = by_rank[0]
    assert sum(1 for of_step in split_bytes if of_step) >= 3, "few steps had a split item"
    assert worst_difference(found, expected) <= TOLERANCE


def test_media_of_several_ranks_that_do_not_decode_are_one_skipped_sample_each(tmp_path: Path) -> None:
    """An image that is split, and a video that breaks after the items that some of its ranks hold."""
    large = Media("image", "png", b"no image", MediaInfo(width=112, height=112, num_frames=1, duration_s=0.0))
    whole = make_video(28, 28, "gif", num_frames=24, fps=4, seed=1)
    info = MediaInfo(width=28, height=28, num_frames=24, duration_s=6.0, frame_times="1/4 1x24")
    video = replace(whole, data=whole.data[: len(whole.data) * 2 // 3], info=info)
    samples = [
        Sample("broken", "caption", [large, "nothing to see"]),
        Sample("broken-video", "caption", [video, "nothing to see"]),
    ]
    samples += [
        Sample(f"small-{n}", "caption", [make_image(28, 28, "png", n), "a small one"]) for n in range(48)
    ]
    folder = write_shard_set(tmp_path / "shards", {"train": samples, "heldout": samples[2:]})
    few = "train.steps=1 optim.warmup=0 optim.decay=0 train.global_batch_size=4".split()
    few += "data.max_skipped_samples=2 data.shuffle=false".split()
    few += mix(caption=1)
    arguments = overrides(folder, tmp_path, *NARROW, *few)
    [alone] = run_ranks(step_and_skips, 1, [*arguments, *layout(), "dep.mode=coupled"])
    ranks = run_ranks(step_and_skips, 4, [*arguments, *layout(pp=2, dp=2), "dep.split_items=true"])
    names = [f"{folder}/train-00000.tar, sample {key}" for key in ("broken", "broken-video")]
    assert sorted(alone.skipped) == names
    for rank in ranks:
        assert sorted(rank.skipped) == names
        assert rank.loss == pytest.approx(alone.loss, rel=1e-5)
    assert [rank.log.count("skipped ") for rank in ranks] == [2, 0, 0, 0]
    by_item = Counter(item for rank in ranks for item in rank.failures)
    assert len(by_item) == 1 + 3, "the image, and every item of the video"
    assert max(by_item.values()) > 1, "the image is on several ranks"
    assert sum(len(rank.failures) > 0 for rank in ranks) > 2, "the items of the video are on several ranks"


class Skips(NamedTuple):
    """Of one rank."""

    loss: float
    """Of the first step."""
    skipped: list[str]
    """Samples left out."""
    failures: list[tuple[int, ...]]
    """Items that did not decode on this rank: replica, micro-batch, position in it."""
    log: str


def step_and_skips(context: RankContext, arguments: Sequence[str]) -> Skips:
    from k25_train.training.step import train_step

    log = StringIO()
    logging.getLogger("k25_train").addHandler(logging.StreamHandler(log))
    run = start_run(context, arguments)
    with run.data:
        loss = train_step(run, 1).loss
        failures = [each[:3] for each in run.data.reader.heldout.read(run.data.loader.plan(0)).failures]
    return Skips(loss, list(run.data.skip_log.skipped), failures, log.getvalue())
