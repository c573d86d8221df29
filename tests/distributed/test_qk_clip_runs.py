"""QK-Clip over the steps of a run: logits stay at the threshold, and what that costs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.helpers.interrupted_runs import SHORT, assert_goes_on, cut_off, rows, short_run
from tests.helpers.large_query_runs import (
    CLIP,
    MODEL,
    NO_CLIP,
    NUM_HEADS,
    NUM_LAYERS,
    enlarge_queries,
)
from tests.helpers.parity import (
    CLIPPED,
    EVERYTHING_OVERLAPS,
    NARROW,
    TOLERANCE,
    Case,
    Parity,
    worst_difference,
)
from tests.helpers.ranks import RankContext, RankError, run_ranks
from tests.helpers.runs import fit, layout, overrides, start_run, train
from tests.helpers.smoke_mix import mix
from tests.helpers.tiny_model import modules_of

pytestmark = pytest.mark.distributed

LIMIT = 20.0
CLIP_AT_LIMIT, ONLY_RECORD = f"optim.qk_clip_threshold={LIMIT}", "optim.qk_clip_threshold=1e9"
STEADY = [
    *"model.num_dense_layers=4 optim.warmup=0 optim.decay=1".split(),
    *mix(text=1),
]
"""One layer has experts, and there is text only: tokens that change their expert make logits jump."""
LARGE = 60.0


class Step(NamedTuple):
    """What one step reports."""

    loss: float
    grad_norm: float
    max_logit: float
    heads_clipped: int


def train_with_large_queries(
    context: RankContext, arguments: Sequence[str], layers: Sequence[int], batches: Sequence[int]
) -> list[Step]:
    """Steps on the batches of these numbers of a run whose queries in `layers` are large at the start."""
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    enlarge_queries(run, LARGE, layers, range(NUM_HEADS))
    with run.data:
        results = [train_step(run, number) for number in batches]
    found = []
    for result in results:
        assert result.clip.max_logits
        found.append(
            Step(result.loss, result.grad_norm, max(result.clip.max_logits), result.clip.heads_clipped)
        )
    return found


def test_logits_past_the_threshold_are_back_within_two_steps(data: Path, tmp_path: Path) -> None:
    command = [*overrides(data, tmp_path, *layout(), *MODEL, *STEADY), "train.steps=9", "optim.lr=2e-4"]
    again = [1] * 8
    clipped, not_clipped = (
        run_ranks(train_with_large_queries, 1, [*command, how], [NUM_LAYERS - 1], again)[0]
        for how in (CLIP_AT_LIMIT, ONLY_RECORD)
    )
    # Forward and backward of the step that clips are what they are without.
    assert clipped[0][:3] == not_clipped[0][:3]
    assert clipped[0].heads_clipped == NUM_HEADS
    assert clipped[0].max_logit > 1.4 * LIMIT
    # What is clipped is what was seen before the update: its own drift stays.
    assert max(step.max_logit for step in clipped[2:]) < 1.02 * LIMIT
    assert min(step.max_logit for step in not_clipped) > 1.4 * LIMIT
    assert not any(step.heads_clipped for step in not_clipped)


def test_at_a_high_rate_logits_grow_without_clipping_and_stay_with_it(data: Path, tmp_path: Path) -> None:
    command = [*overrides(data, tmp_path, *layout(), *MODEL, *STEADY), "train.steps=13", "optim.lr=1e-2"]
    clipped, not_clipped = (
        run_ranks(train_with_large_queries, 1, [*command, how], range(NUM_LAYERS), range(1, 13))[0]
        for how in (CLIP_AT_LIMIT, ONLY_RECORD)
    )
    assert not_clipped[-1].max_logit > 1.25 * not_clipped[0].max_logit > 2 * LIMIT
    # Other tokens in every step, which nothing was clipped for yet.
    assert max(step.max_logit for step in clipped[2:]) < 1.5 * LIMIT
    assert clipped[-1].max_logit < 1.15 * LIMIT


def test_recording_changes_no_bit(data: Path, tmp_path: Path) -> None:
    command = overrides(data, tmp_path, *layout(), *MODEL, "train.steps=3", "optim.decay=1")
    command += ["optim.warmup=1"]
    recorded, silent = (run_ranks(train, 1, [*command, how])[0] for how in (ONLY_RECORD, NO_CLIP))
    assert recorded == silent


def test_clipped_runs_are_those_of_one_process(parity: Parity) -> None:
    few = ("train.steps=6", "optim.decay=2")
    changes = (*CLIPPED, *few)
    case = Case({"pp": 2, "vpp": 2, "ep": 2, "dp": 2}, more=EVERYTHING_OVERLAPS)
    assert parity.difference(case, *changes) <= TOLERANCE
    unclipped = parity.serial(case.num_layers, case.global_batch_size, NO_CLIP, *few)
    clipped = parity.serial(case.num_layers, case.global_batch_size, *changes)
    assert worst_difference(clipped, unclipped) > 100 * TOLERANCE


def test_a_clipped_run_goes_on_bitwise(data: Path, tmp_path: Path) -> None:
    """Every second step is sampled, the same ones after a resume."""
    finished, resumed = tmp_path / "finished", tmp_path / "resumed"
    how = [*layout(dp=2), *NARROW, "train.dtype=bfloat16", "optim.qk_clip_threshold=0.005"]
    how += ["optim.qk_clip_interval=2"]
    run_ranks(fit, 2, short_run(data, finished, *how), timeout_s=240.0)
    cut_off(finished, resumed)
    run_ranks(fit, 2, short_run(data, resumed, *how), timeout_s=240.0)
    assert_goes_on(resumed, finished, after=SHORT.saved_at)
    steps = rows(finished)[1:]
    sampled = [row for row in steps if "max_logits" in row]
    assert [row["step"] for row in sampled] == list(range(1, len(steps) + 1, 2))
    assert all(row["heads_clipped"] for row in sampled if row["step"] <= SHORT.saved_at + 2)
    assert not any("heads_clipped" in row or "max_logit" in row for row in steps if row not in sampled)
    for row in sampled:
        by_layer = row["max_logits"]
        assert isinstance(by_layer, list)
        assert len(by_layer) == NUM_LAYERS
        assert row["max_logit"] == pytest.approx(max(by_layer), rel=1e-4)


# Cost and faults -------------------------------------------------------------------------------------------


def reductions_of_a_step(context: RankContext, arguments: Sequence[str]) -> list[int]:
    """Elements of each tensor that a step reduces over ranks to all of them."""
    import torch.distributed as dist

    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    sizes: list[int] = []
    reduce = vars(dist.ProcessGroup)["allreduce"]

    def reduce_and_note(group: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(sum(tensor.numel() for tensor in ([tensors] if torch.is_tensor(tensors) else tensors)))
        return reduce(group, tensors, *args, **kwargs)

    with run.data:
        train_step(run, 1)
        dist.ProcessGroup.allreduce = reduce_and_note
        train_step(run, 2)
    dist.ProcessGroup.allreduce = reduce
    return sizes


def test_one_collective_a_step(data: Path, tmp_path: Path) -> None:
    command = overrides(data, tmp_path, *layout(pp=2), *MODEL)
    clipped, silent = (run_ranks(reductions_of_a_step, 2, [*command, how]) for how in (CLIP, NO_CLIP))
    for with_clip, without in zip(clipped, silent, strict=True):
        assert len(without) > 0
        assert sorted(with_clip) == sorted([*without, NUM_LAYERS * NUM_HEADS])


def step_on_nan(context: RankContext, arguments: Sequence[str]) -> tuple[Any, bool]:
    """A step with a NaN in the first layer's queries: what QK-Clip says, and whether all weights stayed."""
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    enlarge_queries(run, float("nan"), [0], [1])
    before = [parameter.clone() for module in run.modules for parameter in module.parameters()]
    with run.data:
        result = train_step(run, 1)
    after = [parameter for module in run.modules for parameter in module.parameters()]
    same = all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(before, after, strict=True))
    return result.clip, same


def test_logits_that_are_nan_clip_nothing_and_are_reported(data: Path, tmp_path: Path) -> None:
    command = overrides(data, tmp_path, *layout(pp=2), *MODEL, "optim.qk_clip_threshold=1e-3")
    for clip, same in run_ranks(step_on_nan, 2, command):
        assert same
        assert clip.heads_clipped == 0
        assert clip.max_logits == (float("inf"),) * NUM_LAYERS


def step_with_a_silent_layer(context: RankContext, arguments: Sequence[str]) -> None:
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    cores = list(modules_of(run.chunks[0], "DocumentAttention"))
    # As in an evaluation.
    cores[3].eval()
    with run.data:
        train_step(run, 1)


def test_a_layer_that_records_nothing_is_an_error(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RankError, match=r"qk_clip_threshold=1, but layers \[3\] recorded no attention logits"
    ):
        run_ranks(step_with_a_silent_layer, 1, overrides(data, tmp_path, *layout(), *MODEL, CLIP))


def weights_between_samples(context: RankContext, arguments: Sequence[str]) -> list[tuple[bool, int]]:
    """Of each step: whether a head's queries shrank beyond what the update does, and heads clipped."""
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    enlarge_queries(run, LARGE, range(NUM_LAYERS), range(NUM_HEADS))
    (weight, *_) = [
        each.linear_q_up_proj.weight for each in modules_of(run.chunks[0], "PackedLatentAttention")
    ]
    found = []
    with run.data:
        for number in range(1, 6):
            before = weight.detach().norm()
            result = train_step(run, number)
            found.append((bool(weight.detach().norm() < 0.9 * before), result.clip.heads_clipped))
    return found


def test_between_two_samples_nothing_is_clipped(data: Path, tmp_path: Path) -> None:
    """Though logits are beyond the threshold in every step: those of the step before are not this one's."""
    command = overrides(data, tmp_path, *layout(), *MODEL, "train.steps=6", "optim.lr=2e-4")
    command += ["optim.warmup=0", "optim.decay=1", "optim.qk_clip_threshold=1e-4"]
    found = run_ranks(weights_between_samples, 1, [*command, "optim.qk_clip_interval=3"])[0]
    everything = NUM_LAYERS * NUM_HEADS
    assert found == [(True, everything), (False, 0), (False, 0), (True, everything), (False, 0)]
