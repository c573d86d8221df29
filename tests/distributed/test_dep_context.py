"""Training with the decoupled encoder where ranks share sequences is training in one process."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from k25_train.data.decode.frames import MediaInfo
from tests.helpers.encoder_ways import WAYS
from tests.helpers.parity import (
    NARROW,
    TOLERANCE,
    Case,
    Parity,
    assert_first_loss_agrees,
    worst_difference,
)
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run
from tests.helpers.smoke_mix import mix
from tests.helpers.tiny_shards import Media, Prompt, Sample, make_image, write_shard_set
from tests.helpers.trained import trained_vision

pytestmark = pytest.mark.distributed

FEW = ("train.steps=3", "optim.warmup=1", "optim.decay=1")
IMAGES = (*mix(caption=0.7, video=0.3),)
LAYOUTS = (
    {"cp": 2},
    {"pp": 2, "cp": 2},
    {"dp": 2, "cp": 2},
    {"pp": 2, "vpp": 2, "dp": 2, "cp": 2},
    {"pp": 2, "vpp": 2, "ep": 4, "dp": 2, "cp": 2},
    {"pp": 2, "cp": 4},
)
MARK = "XXXXXX"
BROKEN = Media("image", "png", b"no image", MediaInfo(width=112, height=112, num_frames=1, duration_s=0.0))
BROKEN_GRID = (1, 8, 8)


def check(parity: Parity, sizes: dict[str, int], *changes: str, of_all: Sequence[str] = ()) -> None:
    """A layout with `changes` against one process with a coupled tower; `of_all` changes both."""
    found = parity.losses(Case(sizes, 8, 16, (*changes, *of_all)))
    expected = parity.losses(Case({}, 8, 16, ("dep.mode=coupled", *of_all)))
    assert_first_loss_agrees(found, expected)
    assert worst_difference(found, expected) <= TOLERANCE


def test_bubbles_of_ranks_that_share_sequences_train_as_one_process(parity: Parity) -> None:
    check(parity, {"pp": 2, "vpp": 2, "cp": 2}, *WAYS["bubbles"], of_all=(*FEW, *IMAGES))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["upfront", "bubbles"])
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_every_layout_trains_as_one_process(sizes: dict[str, int], way: str, parity: Parity) -> None:
    check(parity, sizes, *WAYS[way])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ("dep.split_items=true", "dep.max_patches_per_chunk=1"),
        ("dep.feature_buffer_gib=0",),
        ("parallelism.cp_exchange=ring", *WAYS["bubbles"]),
        ("parallelism.overlap_expert_comm=true", *WAYS["bubbles"]),
    ],
    ids=" ".join,
)
def test_options_of_the_encoder_change_no_number(changes: Sequence[str], parity: Parity) -> None:
    sizes = {"pp": 2, "vpp": 2, "ep": 2, "cp": 2}
    check(parity, sizes, *changes, of_all=(*FEW, *IMAGES))


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["projector", "nothing"])
def test_a_frozen_tower_trains_as_one_process(trained: str, parity: Parity) -> None:
    """A projector behind it is in the first stage, where some micro-batches leave ranks without features."""
    check(parity, {"pp": 2, "cp": 2}, of_all=(*FEW, *IMAGES, *trained_vision(trained)))


class Step(NamedTuple):
    """Of one rank."""

    loss: float
    grad_norm: float
    held_out: dict[str, float]
    """Losses after the step."""
    first_stage: list[int]
    skipped: list[str]
    """Samples left out."""
    num_failed: int
    """Items that this rank encodes, at least in part, and that did not decode."""
    takers: set[int]
    """Ranks that take what this one encodes of the broken image."""


def step_of(context: RankContext, arguments: Sequence[str]) -> Step:
    from k25_train.training.evaluation import eval_losses
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    with run.data:
        found = train_step(run, 1)
        held_out = eval_losses(run, 8)
        planned = run.data.reader.training.read(run.data.loader.plan(0))
    plan = planned.work.plan
    takers = {
        receiver
        for transfer in planned.work.transfers
        for (sender, receiver), rows in transfer.items()
        if sender == context.rank
        and any(plan.items[plan.parts[each.part].item].grid_thw == BROKEN_GRID for each in rows)
    }
    skipped = sorted(run.data.skip_log.skipped)
    first_stage = list(run.topology.first_stage_ranks)
    failed = len(planned.failures)
    return Step(found.loss, found.grad_norm, held_out, first_stage, skipped, failed, takers)


@pytest.fixture(scope="module")
def with_faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of many sizes, one of an image that does not decode, one with words that are none."""
    samples = [
        Sample("broken", "caption", [Prompt("what is there to see " * 2), BROKEN, "nothing"]),
        Sample("no-words", "caption", [make_image(84, 84, "png", 5), f"a large one {MARK}"]),
    ]
    samples += [
        Sample(f"image-{n}", "caption", [make_image(28 * (1 + n % 2), 28, "png", n), "one of many sizes"])
        for n in range(46)
    ]
    folder = write_shard_set(
        tmp_path_factory.mktemp("faults") / "shards", {"train": samples, "heldout": samples[2:]}
    )
    for shard in folder.glob("train*.tar"):
        shard.write_bytes(shard.read_bytes().replace(MARK.encode(), b"\xff" * len(MARK)))
    return folder


def test_what_cannot_be_used_changes_nothing_for_ranks_that_share_sequences(
    with_faults: Path, tmp_path: Path
) -> None:
    """An image that several ranks encode, and a document without words, both among those that are shared."""
    few = "train.steps=1 optim.warmup=0 optim.decay=0 train.global_batch_size=4 data.shuffle=false".split()
    few += ["data.max_skipped_samples=2", *mix(caption=1)]
    arguments = overrides(with_faults, tmp_path, *NARROW, *few)
    [alone] = run_ranks(step_of, 1, [*arguments, *layout(), "dep.mode=coupled"])
    ranks = run_ranks(step_of, 4, [*arguments, *layout(pp=2, cp=2), "dep.split_items=true"])
    assert [name.rpartition(" ")[2] for name in alone.skipped] == ["broken", "no-words"]
    for rank in ranks:
        assert rank.skipped == alone.skipped
        assert rank.loss == pytest.approx(alone.loss, rel=1e-6)
        assert rank.grad_norm == pytest.approx(alone.grad_norm, rel=TOLERANCE)
        assert rank.held_out == pytest.approx(alone.held_out, rel=TOLERANCE)
        assert rank.first_stage == [0, 1]
    encoders = [rank for rank in ranks if rank.takers]
    assert len(encoders) > 1, "several ranks encode the image"
    assert [rank.num_failed for rank in encoders] == [1] * len(encoders)
    assert set.union(*(rank.takers for rank in encoders)) <= {0, 1}, "the first stage takes its features"
