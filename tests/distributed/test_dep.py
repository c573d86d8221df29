"""Training with the decoupled encoder is training with the tower in one process, in every layout."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.data.loader import DataLoader
from k25_train.data.mix.plan import media_of
from tests.helpers.encoder_ways import BUBBLES, SMOKE, WAYS, layouts
from tests.helpers.interrupted_runs import FOUR_RANKS, ONE_RANK, SHORT, assert_close, cut_off, rows, short_run
from tests.helpers.parity import (
    EVERYTHING_OVERLAPS,
    FEW_OR_ALL_STEPS,
    TOLERANCE,
    Case,
    Parity,
    assert_first_loss_agrees,
    worst_difference,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import fit
from tests.helpers.smoke_mix import mix

pytestmark = pytest.mark.distributed

ONE_CHUNK_AN_ITEM = "dep.max_patches_per_chunk=1"
ALL_FEATURES_ON_THE_HOST = "dep.feature_buffer_gib=0"
BLENDS_OF_ONE_KIND = {
    "text": mix(text=1),
    "images": mix(caption=1),
    "video": mix(video=1),
}


def check(parity: Parity, sizes: dict[str, int], way: Sequence[str], *changes: str) -> None:
    """A layout against one process with a coupled tower; before the first update nearly to the last bit."""
    # One sequence a micro-batch in both: sums over tokens are taken in one order.
    alone = Case({}, 8, 16, ("dep.mode=coupled", *changes))
    case = Case(sizes, 8, 16, (*way, *changes))
    found, expected = parity.losses(case), parity.losses(alone)
    assert_first_loss_agrees(found, expected)
    assert worst_difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("way", [pytest.param("upfront", marks=pytest.mark.slow), "bubbles"])
@pytest.mark.parametrize("blend", [pytest.param("text", marks=pytest.mark.slow), "images", "video"])
def test_batches_of_one_kind_train_as_in_one_process(blend: str, way: str, parity: Parity) -> None:
    few = ("train.steps=3", "optim.warmup=1", "optim.decay=1")
    check(parity, SMOKE, WAYS[way], ONE_CHUNK_AN_ITEM, *BLENDS_OF_ONE_KIND[blend], *few)


@pytest.mark.parametrize("way", ["upfront", "bubbles"])
def test_replicas_with_unequal_numbers_of_images_train_as_one_process(way: str, parity: Parity) -> None:
    """A gradient of the tower that is a mean over replicas, or over their images, would be off by far."""
    # With the seed of the other runs, a token of step 4 chooses between two experts of equal score.
    few = ("train.steps=4", "optim.warmup=1", "optim.decay=1", "train.seed=1")
    blend = mix(text=0.875, caption=0.125)
    case = Case(SMOKE, 8, 16, (*WAYS[way], *few, *blend))
    assert any(first != second for first, second in images_of_replicas(compose(parity.arguments(case))))
    check(parity, SMOKE, WAYS[way], *few, *blend)


def images_of_replicas(config: Config) -> list[tuple[int, int]]:
    """For each step the images of both replicas."""
    with DataLoader(config.data, config.train, config.model.vision) as loader:
        steps = [loader.plan(step).sequences for step in range(config.train.steps)]
    counted = [[len(list(media_of([sequence]))) for sequence in sequences] for sequences in steps]
    return [(sum(each[: len(each) // 2]), sum(each[len(each) // 2 :])) for each in counted]


@FEW_OR_ALL_STEPS
def test_bubbles_with_everything_that_overlaps_train_as_one_process(
    steps: Sequence[str], parity: Parity
) -> None:
    check(parity, SMOKE, (*BUBBLES, *EVERYTHING_OVERLAPS), *steps)


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw", "muonclip"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", layouts(), ids=str)
def test_every_layout_trains_as_one_process(
    sizes: dict[str, int], way: str, optim: str, parity: Parity
) -> None:
    check(parity, sizes, WAYS[way], f"optim={optim}")


@pytest.mark.parametrize("chunks", [ONE_CHUNK_AN_ITEM, ALL_FEATURES_ON_THE_HOST])
def test_chunks_and_buffers_change_no_number(chunks: str, parity: Parity) -> None:
    few = ("train.steps=4", "optim.warmup=1", "optim.decay=1")
    plain, other = (parity.losses(Case({"pp": 2}, more=(*few, *more))) for more in ((), (chunks,)))
    assert worst_difference(other, plain) <= 1e-6
    # Kernels of some CPUs add up rows by blocks, which depend on how many there are.
    assert other[0][0] == pytest.approx(plain[0][0], rel=1e-9)


def test_a_run_goes_on_with_the_other_kind_of_tower(data: Path, run_as_smoke: Path, tmp_path: Path) -> None:
    coupled = cut_off(run_as_smoke, tmp_path / "coupled")
    run_ranks(fit, 1, short_run(data, coupled, *ONE_RANK, "dep.mode=coupled"))
    assert_close(coupled, run_as_smoke, after=SHORT.saved_at)

    decoupled = cut_off(coupled, tmp_path / "decoupled")
    run_ranks(fit, 4, short_run(data, decoupled, *FOUR_RANKS))
    assert_close(decoupled, run_as_smoke, after=SHORT.saved_at)


def test_a_step_tells_what_the_encoders_did(run_as_smoke: Path) -> None:
    for row in rows(run_as_smoke):
        if "loss" in row:
            assert row["vision_patches_mean"] * 4 == row["patches"]
            assert row["vision_patches_max"] >= row["vision_patches_mean"]
            assert row["vision_work_s_max"] >= row["vision_work_s_mean"]
            # 64 numbers a token, as float32, of features and then of gradients.
            assert row["vision_peak_feature_bytes"] <= row["vision_tokens"] * 64 * 4
            assert row["vision_sent_bytes"] <= 2 * row["vision_tokens"] * 64 * 4
            assert row["vision_exposed_s_max"] < row["step_time_s"]
