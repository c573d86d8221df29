"""Training with activation policies: what is exact trains bitwise as without, in every layout."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.activation_policies import EXACT_K2, OFFLOAD, RECOMPUTE
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, losses_of, overrides, start_run

pytestmark = pytest.mark.distributed

OVERLAP = ("parallelism.overlap_expert_comm=true", "parallelism.delay_wgrad=true")
EXACT = {"recompute": RECOMPUTE, "offload": OFFLOAD, "both": EXACT_K2}
BUCKETS = ("parallelism.overlap_grad_reduce=true", "parallelism.overlap_param_gather=true")
ALL_AT_ONCE = [*layout(pp=2, vpp=2, ep=2, dp=2), *OVERLAP, *BUCKETS]
LAYOUTS = {
    "alone": (1, layout()),
    "pp2": (2, layout(pp=2)),
    "pp2 vpp2": (2, layout(pp=2, vpp=2)),
    "ep2 overlap": (2, [*layout(ep=2, dp=2), *OVERLAP]),
    "pp2 vpp2 ep2 overlap": (4, ALL_AT_ONCE),
}
TOWERS = {
    "coupled": ["dep.mode=coupled"],
    "upfront": ["dep.schedule=upfront"],
    "bubbles": ["dep.schedule=bubbles"],
}


def losses(data: Path, folder: Path, num_ranks: int, *more: str) -> list[tuple[float, float]]:
    steps = ("train.steps=3", "optim.warmup=1", "optim.decay=1")
    return losses_of(overrides(data, folder / "run", *steps, *more), num_ranks)


@pytest.fixture(scope="module")
def kept(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    """With all mechanisms at once, and activations kept."""
    return losses(data, tmp_path_factory.mktemp("kept"), 4, *ALL_AT_ONCE)


@pytest.mark.parametrize("name", EXACT)
def test_exact_policies_train_bitwise_alike(
    data: Path, tmp_path: Path, kept: list[tuple[float, float]], name: str
) -> None:
    assert losses(data, tmp_path, 4, *ALL_AT_ONCE, *EXACT[name]) == kept


def test_k2_trains_nearly_alike(data: Path, tmp_path: Path, kept: list[tuple[float, float]]) -> None:
    k2 = losses(data, tmp_path, 4, *ALL_AT_ONCE, "activation=k2")
    assert_near(k2, kept)


def assert_near(rounded: list[tuple[float, float]], kept: list[tuple[float, float]]) -> None:
    assert rounded[0][0] == kept[0][0], "the first loss comes before any gradient"
    assert rounded != kept
    for (loss, norm), (exact_loss, exact_norm) in zip(rounded, kept, strict=True):
        assert loss == pytest.approx(exact_loss, rel=5e-3)
        assert norm == pytest.approx(exact_norm, rel=5e-2)


@pytest.mark.slow
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("sizes", LAYOUTS)
def test_every_layout_and_tower(data: Path, tmp_path: Path, sizes: str, tower: str) -> None:
    num_ranks, places = LAYOUTS[sizes]
    more = [*places, *TOWERS[tower]]
    kept = losses(data, tmp_path, num_ranks, *more)
    for name, policies in EXACT.items():
        assert losses(data, tmp_path, num_ranks, *more, *policies) == kept, name
    assert_near(losses(data, tmp_path, num_ranks, *more, "activation=k2"), kept)


# What is held -----------------------------------------------------------------------------------------------


def held_by_nodes(context: RankContext, arguments: Sequence[str], *, lets_go: bool) -> tuple[int, Any]:
    """Most bytes that Python holds of activations between passes of a step, and the engine's figures."""
    from parallel.activations.storage import weights_of
    from parallel.megatron import ep_overlap_activations

    run = start_run(context, arguments)
    from k25_train.training import activations
    from parallel.activations.manager import ActivationManager

    if not lets_go:
        ep_overlap_activations._release = lambda *_: None
        activations.deallocate_data = lambda _: None
        ActivationManager.hold_output = lambda *_: None
    from k25_train.training.step import train_step

    weights = weights_of([each.module for each in run.modules])
    most = 0

    def note(_num_passes: int) -> None:
        nonlocal most
        tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.requires_grad]
        held = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}
        most = max(most, sum(size for address, size in held.items() if address not in weights))

    before_pass = run.activations.before_pass

    def before_pass_and_note(num_passes: int) -> None:
        before_pass(num_passes)
        note(num_passes)

    run.activations.before_pass = before_pass_and_note
    with run.data:
        result = train_step(run, 1)
    return most, result.offload


@pytest.mark.parametrize(
    ("num_ranks", "sizes", "share"),
    [(4, ALL_AT_ONCE, 0.3), (2, layout(pp=2, vpp=2), 0.7)],
    ids=["overlap", "plain"],
)
def test_schedules_hold_nothing_beside_the_policies(
    data: Path, tmp_path: Path, num_ranks: int, sizes: list[str], share: float
) -> None:
    """Nor does the engine hold more than its budgets."""
    budgets = ["activation.host_gib=0.25", "activation.device_gib=0.001"]
    arguments = overrides(data, tmp_path / "run", *sizes, *OFFLOAD, *budgets)
    freed, stats = run_ranks(_freed, num_ranks, arguments)[0]
    held, _ = run_ranks(_held, num_ranks, arguments)[0]
    assert freed < share * held
    assert 0 < stats.peak_device_bytes <= 0.001 * 2**30
    assert 0 < stats.peak_host_bytes <= 0.25 * 2**30
    assert 0 < stats.loaded_bytes <= stats.saved_bytes


def _freed(context: RankContext, arguments: Sequence[str]) -> tuple[int, Any]:
    return held_by_nodes(context, arguments, lets_go=True)


def _held(context: RankContext, arguments: Sequence[str]) -> tuple[int, Any]:
    return held_by_nodes(context, arguments, lets_go=False)
