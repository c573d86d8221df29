"""A frozen tower, alone or with its projector: trained as in one process, and what stays costs no work."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.helpers.encoder_ways import SMOKE, WAYS, layouts
from tests.helpers.interrupted_runs import FOUR_RANKS, ONE_RANK, assert_close, cut_off, short_run
from tests.helpers.parity import (
    DATA_OVERLAPS,
    EVERYTHING_OVERLAPS,
    TOLERANCE,
    Case,
    Parity,
    assert_first_loss_agrees,
    worst_difference,
)
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import fit, layout, overrides, start_run
from tests.helpers.smoke_mix import mix
from tests.helpers.trained import trained_vision

pytestmark = pytest.mark.distributed

FROZEN = ("projector", "nothing")
DECOUPLED, COUPLED = "dep.mode=decoupled", "dep.mode=coupled"
FEW = ("train.steps=3", "optim.warmup=1", "optim.decay=1")
ONE_IMAGE_IN_MANY = mix(text=0.94, caption=0.02, ocr=0.02, video=0.02)


def check(parity: Parity, sizes: dict[str, int], both: Sequence[str], *more: str) -> None:
    """A layout against one process with a coupled tower; before the first update nearly to the last bit."""
    # One sequence a micro-batch in both: sums over tokens are taken in one order.
    expected = parity.serial(8, 16, "train.micro_batch_size=1", *both)
    found = parity.losses(Case(sizes, 8, 16, (*more, *both)))
    assert_first_loss_agrees(found, expected)
    assert worst_difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("trained", "way"),
    [
        ("projector", "bubbles"),
        ("nothing", "upfront"),
        pytest.param("projector", "coupled", marks=pytest.mark.slow),
        pytest.param("projector", "upfront", marks=pytest.mark.slow),
    ],
)
def test_training_is_that_of_one_process(trained: str, way: str, parity: Parity) -> None:
    check(parity, SMOKE, (*trained_vision(trained), *FEW), *WAYS[way])


def test_gradients_are_complete_without_images(parity: Parity) -> None:
    """Most micro-batches have no image, and reductions wait for every parameter's gradient."""
    both = ("optim.vision_tower.trained=false", *FEW, *ONE_IMAGE_IN_MANY)
    check(parity, SMOKE, both, DECOUPLED, *EVERYTHING_OVERLAPS)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("trained", FROZEN)
@pytest.mark.parametrize("sizes", layouts(), ids=str)
def test_every_layout_trains_as_one_process(
    sizes: dict[str, int], trained: str, way: str, parity: Parity
) -> None:
    check(parity, sizes, trained_vision(trained), *WAYS[way], *DATA_OVERLAPS)


# What is done, and what is not -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Observed:
    """Of one rank."""

    before: dict[str, Tensor]
    """Name -> weights of the vision part that the rank holds, at the start."""
    after: dict[str, Tensor]
    """The same after the steps."""
    with_gradient: set[str]
    """Names of the vision part's parameters that have a place in a gradient buffer or in the optimizer."""
    backward_s: float
    """Seconds of vision recompute and backward, all steps."""
    sent_bytes: int
    """What the encoder sent, all steps."""
    num_tokens_sent: int
    """Vision tokens that the rank encodes for others, by the plans of the steps."""


def observe(context: RankContext, arguments: Sequence[str]) -> Observed:
    """Train all steps and look at what happened to the vision part."""
    from k25_train.training.step import train_step
    from parallel.megatron.replicas import complete_parameters

    run = start_run(context, arguments)
    named = {
        name: parameter
        for module in run.modules
        for name, parameter in module.module.named_parameters()
        if name.startswith(("vision_tower.", "mm_projector."))
    }
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    backward_s, sent_bytes, num_tokens = 0.0, 0, 0
    with run.data:
        for step in range(1, run.config.train.steps + 1):
            train_step(run, step)
            stats = run.tower.engine.stats
            backward_s += stats.backward_s
            sent_bytes += stats.sent_bytes
            num_tokens += tokens_for_others(run, step)
    # The encoder's weights are still on their way.
    complete_parameters(run.modules)
    buffers = [each for module in run.modules for each in module.buffers + module.expert_parallel_buffers]
    gathered = {parameter for buffer in buffers for parameter in buffer.params}
    updated = {each for part in run.optimizer.chained_optimizers for each in part.shards()}
    return Observed(
        before=before,
        after={name: parameter.detach().clone() for name, parameter in named.items()},
        with_gradient={name for name, parameter in named.items() if parameter in gathered | updated},
        backward_s=backward_s,
        sent_bytes=sent_bytes,
        num_tokens_sent=num_tokens,
    )


def tokens_for_others(run: Any, step: int) -> int:
    """Vision tokens that this rank encodes in a step for first stages that are other ranks."""
    plan = run.data.reader.heldout.read(run.data.loader.plan(step - 1)).work.plan
    rank, receivers = run.topology.rank, run.topology.first_stage_ranks
    own = [plan.parts[part] for chunk in plan.chunks[rank] for part in chunk]
    return sum(part.num_tokens for part in own if receivers[plan.items[part.item].replica] != rank)


@pytest.fixture(scope="module")
def observed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Observed]]:
    """Parts of vision that are trained -> each rank of a short run with a decoupled encoder."""
    few = ("train.steps=1", "optim.warmup=0", "optim.decay=0")
    command = overrides(data, tmp_path_factory.mktemp("observed"), *layout(**SMOKE), *few, DECOUPLED)
    return {
        trained: run_ranks(observe, 4, [*command, *trained_vision(trained)]) for trained in ("all", *FROZEN)
    }


@pytest.mark.parametrize(
    ("trained", "expected"),
    [("all", {"vision_tower", "mm_projector"}), ("projector", {"mm_projector"}), ("nothing", set())],
)
def test_what_is_trained_changes_and_nothing_else(
    trained: str, expected: set[str], observed: dict[str, list[Observed]]
) -> None:
    start, seen = observed["all"][0].before, set()
    for rank in observed[trained]:
        for name, weights in rank.before.items():
            seen.add(name)
            is_trained = name.split(".")[0] in expected
            assert weights.equal(start[name]), f"{name} starts otherwise"
            assert (name in rank.with_gradient) == is_trained, name
            assert rank.after[name].equal(weights) == (not is_trained), name
    assert seen == start.keys()


@pytest.mark.parametrize(
    # Features and gradients of 64 numbers a token; features of 4 patches of 32 numbers each; features of 64.
    ("trained", "bytes_a_token"),
    [("all", 2 * 64 * 4), ("projector", 4 * 32 * 4), ("nothing", 64 * 4)],
)
def test_a_frozen_tower_has_no_backward_pass_and_is_sent_no_gradient(
    trained: str, bytes_a_token: int, observed: dict[str, list[Observed]]
) -> None:
    ranks = observed[trained]
    assert all((rank.backward_s > 0) == (trained == "all") for rank in ranks)
    num_tokens = sum(rank.num_tokens_sent for rank in ranks)
    assert sum(rank.sent_bytes for rank in ranks) == num_tokens * bytes_a_token > 0


@pytest.mark.parametrize("trained", [FROZEN[0], pytest.param(FROZEN[1], marks=pytest.mark.slow)])
def test_a_run_goes_on_with_the_other_kind_of_tower(trained: str, data: Path, tmp_path: Path) -> None:
    middle, last = 2, 3
    both = (*trained_vision(trained), *FEW, f"train.eval_interval={last}", "checkpoint.interval=1")
    finished = tmp_path / "finished"
    run_ranks(fit, 1, short_run(data, finished, *ONE_RANK, COUPLED, *both))

    decoupled = cut_off(finished, tmp_path / "decoupled", last)
    run_ranks(fit, 4, short_run(data, decoupled, *FOUR_RANKS, *both))
    assert_close(decoupled, finished, after=middle)

    coupled = cut_off(decoupled, tmp_path / "coupled", last)
    run_ranks(fit, 1, short_run(data, coupled, *ONE_RANK, COUPLED, *both))
    assert_close(coupled, finished, after=middle)
