"""A language model that is not trained, and router biases that stay: what moves, what does not, parity."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from tests.helpers.encoder_ways import SMOKE, WAYS
from tests.helpers.interrupted_runs import FOUR_RANKS, ONE_RANK, assert_close, cut_off, short_run
from tests.helpers.parity import (
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

pytestmark = pytest.mark.distributed

FROZEN = "optim.language_model.trained=false"
PROJECTOR = (FROZEN, "optim.vision_tower.trained=false")
FEW = ("train.steps=3", "optim.warmup=1", "optim.decay=1")
SOME_IMAGES = mix(text=0.7, caption=0.1, ocr=0.1, video=0.1)
BIAS = "expert_bias"


@pytest.mark.parametrize(
    ("trained", "more"),
    [
        ((FROZEN, *SOME_IMAGES), (*WAYS["bubbles"], *EVERYTHING_OVERLAPS)),
        ((FROZEN, "activation=k2"), (*WAYS["coupled"], "optim.offload=cpu")),
        pytest.param((*PROJECTOR, *SOME_IMAGES), WAYS["upfront"], marks=pytest.mark.slow),
        pytest.param(PROJECTOR, (*WAYS["coupled"], *EVERYTHING_OVERLAPS), marks=pytest.mark.slow),
        pytest.param((FROZEN, "optim=adamw"), WAYS["upfront"], marks=pytest.mark.slow),
    ],
)
def test_vision_is_trained_as_in_one_process(
    trained: Sequence[str], more: Sequence[str], parity: Parity
) -> None:
    """Micro-batches may have no image: these go backward all the same, and add nothing."""
    both = ("train.micro_batch_size=1", *trained, *FEW)
    expected = parity.serial(8, 16, *both)
    found = parity.losses(Case(SMOKE, 8, 16, (*more, *both)))
    assert_first_loss_agrees(found, expected)
    assert worst_difference(found, expected) <= TOLERANCE


@dataclass(frozen=True, slots=True)
class Observed:
    """Of one rank."""

    changed: list[set[str]]
    """[step] -> parameters and biases that it has changed."""
    held: set[str]
    """All of them."""
    with_gradient: set[str]
    """Parameters that have a place in a gradient buffer or in the optimizer."""


def observe(context: RankContext, arguments: Sequence[str]) -> Observed:
    """Train all steps and look at what each changes."""
    from k25_train.training.step import train_step
    from parallel.megatron.replicas import complete_parameters

    run = start_run(context, arguments)
    held: dict[str, Tensor] = {}
    for number, module in enumerate(run.modules):
        held |= {f"{name} of {number}": each for name, each in module.module.named_parameters()}
        buffers = module.module.named_buffers()
        held |= {f"{name} of {number}": each for name, each in buffers if name.endswith(BIAS)}
    changed = []
    with run.data:
        for step in range(1, run.config.train.steps + 1):
            before = {name: each.detach().clone() for name, each in held.items()}
            train_step(run, step)
            complete_parameters(run.modules)
            changed.append({name for name, each in held.items() if not each.equal(before[name])})
    buffers = [each for module in run.modules for each in module.buffers + module.expert_parallel_buffers]
    gathered = {parameter for buffer in buffers for parameter in buffer.params}
    updated = {each for part in run.optimizer.chained_optimizers for each in part.shards()}
    return Observed(changed, set(held), {name for name, each in held.items() if each in gathered | updated})


def test_a_frozen_language_model_has_no_gradients_and_does_not_move(data: Path, tmp_path: Path) -> None:
    few = ("train.steps=2", "optim.warmup=0", "optim.decay=0", "optim.qk_clip_threshold=0.01", FROZEN)
    for rank in run_ranks(observe, 4, overrides(data, tmp_path, *layout(**SMOKE), *few)):
        vision = {name for name in rank.held if name.startswith(("vision_tower", "mm_projector"))}
        assert any(name.split(" ")[0].endswith(BIAS) for name in rank.held)
        assert rank.with_gradient == vision
        assert rank.changed == [vision, vision]


def test_biases_stay_in_the_last_part_of_a_run(data: Path, tmp_path: Path) -> None:
    few = ("train.steps=4", "optim.warmup=0", "optim.decay=0", "optim.frozen_expert_bias=2")
    for rank in run_ranks(observe, 2, overrides(data, tmp_path, *layout(pp=2), *few)):
        biases = [any(name.split(" ")[0].endswith(BIAS) for name in of_step) for of_step in rank.changed]
        assert biases == [True, True, False, False]


@pytest.mark.parametrize("trained", [PROJECTOR, pytest.param((FROZEN,), marks=pytest.mark.slow)])
def test_a_run_goes_on_in_another_layout(trained: Sequence[str], data: Path, tmp_path: Path) -> None:
    middle, last = 2, 3
    both = (*trained, *FEW, f"train.eval_interval={last}", "checkpoint.interval=1")
    finished = tmp_path / "finished"
    run_ranks(fit, 1, short_run(data, finished, *ONE_RANK, "dep.mode=coupled", *both))
    decoupled = cut_off(finished, tmp_path / "decoupled", last)
    run_ranks(fit, 4, short_run(data, decoupled, *FOUR_RANKS, *both))
    assert_close(decoupled, finished, after=middle)
