"""Norms of the model's parts: equal in every layout, with limits of their own before the global one."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.parity import FEW_STEPS, NARROW, TOLERANCE
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run

pytestmark = pytest.mark.distributed

Norms = tuple[float, dict[str, float], dict[str, float]]
"""Of a step: the global gradient norm, and those of the parts' gradients and weights."""
PARTS = ("language_model", "vision_tower", "mm_projector")
LIMITED = ("optim.vision_tower.grad_clip=0.02", "optim.mm_projector.grad_clip=0.01", "optim.grad_clip=0.5")
"""Limits that matter in every step."""


def train(context: RankContext, arguments: list[str]) -> list[Norms]:
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    found = []
    with run.data:
        for step in range(1, run.config.train.steps + 1):
            result = train_step(run, step)
            weights = {part: result.weight_norms[part] for part in result.part_grad_norms}
            found.append((result.grad_norm, dict(result.part_grad_norms), weights))
    return found


def norms(data: Path, folder: Path, sizes: dict[str, int], *more: str) -> list[Norms]:
    model = ("model.num_layers=8", "train.global_batch_size=16", "metrics.weight_norm_interval=1", *FEW_STEPS)
    arguments = overrides(data, folder, *layout(**sizes), *NARROW, *model, *more)
    by_rank: list[Any] = run_ranks(train, sizes.get("pp", 1) * sizes.get("dp", 1), arguments)
    assert all(found == by_rank[0] for found in by_rank)
    return by_rank[0]


@pytest.mark.parametrize(
    "more",
    [
        LIMITED,
        pytest.param((*LIMITED, "optim.offload=cpu", "dep.mode=coupled"), marks=pytest.mark.slow),
        pytest.param(("optim.vision_tower.trained=false",), marks=pytest.mark.slow),
    ],
)
def test_every_layout_has_the_norms_of_one_process(more: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    both = tuple(each for each in more if not each.startswith(("optim.offload", "dep")))
    one = norms(data, tmp_path / "one", {}, "dep.mode=coupled", *both)
    many = norms(data, tmp_path / "many", {"pp": 2, "vpp": 2, "ep": 2, "dp": 2}, *more)
    trained = [part for part in PARTS if f"optim.{part}.trained=false" not in more]
    for (whole, gradients, weights), (_, others, other_weights) in zip(one, many, strict=True):
        assert list(gradients) == list(others) == list(weights) == trained
        assert whole == pytest.approx(math.sqrt(sum(norm**2 for norm in gradients.values())), rel=1e-12)
        for part in trained:
            assert others[part] == pytest.approx(gradients[part], rel=TOLERANCE), part
            assert other_weights[part] == pytest.approx(weights[part], rel=TOLERANCE), part


def clip(context: RankContext, arguments: list[str]) -> dict[str, list[float]]:
    """Part -> norms of its gradient before and after clipping, in the first step."""
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    after: dict[str, float] = {}

    def look() -> None:
        after.update(run.optimizer._norms.of_gradients(run.optimizer.get_grad_stats_parallel_group()))

    run.optimizer.before_update = look
    with run.data:
        before = train_step(run, 1).part_grad_norms
    return {part: [before[part], after[part]] for part in before}


def test_a_part_is_limited_before_all_are(data: Path, tmp_path: Path) -> None:
    limits = ("optim.vision_tower.grad_clip=0.02", "optim.mm_projector.grad_clip=1000", "optim.grad_clip=0.1")
    few = ("train.steps=1", "optim.warmup=0", "optim.decay=0")
    found = run_ranks(clip, 2, overrides(data, tmp_path, *layout(dp=2), *few, *limits))[0]
    text, tower, projector = (found[part] for part in PARTS)
    assert tower[0] > 0.02
    assert projector[0] < 1000
    whole = math.sqrt(text[0] ** 2 + 0.02**2 + projector[0] ** 2)
    assert whole > 0.1
    expected = [0.1 / whole * norm for norm in (text[0], 0.02, projector[0])]
    assert [text[1], tower[1], projector[1]] == pytest.approx(expected, rel=1e-4)


def move(context: RankContext, arguments: list[str]) -> dict[str, float]:
    """Part -> how far one step moves its weights."""
    import torch

    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    named = {name: each for module in run.modules for name, each in module.module.named_parameters()}
    before = {name: each.detach().clone() for name, each in named.items()}
    with run.data:
        train_step(run, 1)
    squares = dict.fromkeys(PARTS, 0.0)
    for name, each in named.items():
        squares[name.split(".", 1)[0]] += float(torch.sum((each.detach() - before[name]).double() ** 2))
    return {part: math.sqrt(square) for part, square in squares.items()}


def test_each_part_has_a_rate_of_its_own(data: Path, tmp_path: Path) -> None:
    few = ("train.steps=1", "optim.warmup=0", "optim.decay=0", "optim.weight_decay=0", "dep.mode=coupled")
    scales = dict(zip(PARTS, (0.5, 0.25, 2.0), strict=True))
    scaled = [f"optim.{part}.lr_scale={scale}" for part, scale in scales.items()]
    arguments = overrides(data, tmp_path, *layout(), *few)
    alike, apart = (run_ranks(move, 1, [*arguments, *more])[0] for more in ((), scaled))
    for part, scale in scales.items():
        assert apart[part] == pytest.approx(scale * alike[part], rel=1e-3), part
