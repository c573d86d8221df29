"""Padding is nothing: the same documents train alike whatever is padded behind them, in any layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.parity import EVERYTHING_OVERLAPS
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run
from tests.helpers.smoke_mix import mix
from tests.helpers.tiny_model import modules_of
from tests.helpers.tiny_shards import Sample, make_image, make_text, write_shard_set

pytestmark = pytest.mark.distributed

SHORT, LONG = 96, 112
"""Tokens of sequences into which one document of the set fits, and no second one."""
STEPS = 3
ONE_A_ROW = (
    mix(caption=1)
    + (
        "train.eval_sequences=4 train.global_batch_size=4 optim.warmup=1 optim.decay=1 "
        "optim.lr=1e-3 "
        f"model.balance_loss_coeff=0.1 optim.qk_clip_threshold=0.3 train.steps={STEPS}"
    ).split()
)
"""Overrides with which a document is a sequence, and the balance loss and QK-Clip count."""
TIMES = ("step_time_s", "wait_s", "tokens_per_s", "work_s", "exposed_s")
"""Parts of the names of figures that measure time."""
OF_PADDING = ("seq_len", "padding_share")
"""Figures that say how much padding there is."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What one rank saw of a run."""

    rows: list[dict[str, Any]]
    """What metrics.jsonl says of each step, but for times."""
    biases: dict[int, list[Tensor]]
    """Layer -> expert bias after each step."""
    evaluation: dict[str, float]
    """Held-out losses after the last step."""
    weights: list[Tensor]
    """Of the rank's first chunk, after the last step."""


def observe(context: RankContext, arguments: Sequence[str]) -> Observed:
    from k25_train.training.evaluation import eval_losses
    from k25_train.training.rows import metrics_row
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    routers = [each for chunk in run.chunks for each in modules_of(chunk, "SequenceBalancedRouter")]
    rows, biases = [], {router.layer_number: [] for router in routers}
    with run.data:
        for step in range(1, STEPS + 1):
            row = metrics_row(run.config, step, train_step(run, step), is_mixed_anew=False)
            rows.append(
                {name: row[name] for name in row if not any(part in name for part in (*TIMES, *OF_PADDING))}
            )
            for router in routers:
                biases[router.layer_number].append(router.expert_bias.clone())
        evaluation = eval_losses(run, 4)
    return Observed(rows, biases, evaluation, [each.detach() for each in run.chunks[0].parameters()])


@pytest.fixture(scope="module")
def one_a_row(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of 60 to 96 tokens, more than half of `LONG`."""
    splits = {
        split: [
            Sample(f"{i}", "caption", [make_image(56, 56, "png", i), make_text(21 + i % 2, i)])
            for i in range(start, start + count)
        ]
        for split, start, count in (("train", 100, 40), ("heldout", 1100, 12))
    }
    return write_shard_set(tmp_path_factory.mktemp("one_a_row"), splits)


@pytest.fixture(scope="module")
def short(one_a_row: Path, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """One process with the least padding."""
    return run_padded(one_a_row, tmp_path_factory.mktemp("short"), SHORT)


def run_padded(data: Path, folder: Path, seq_len: int, *more: str, **sizes: int) -> Observed:
    arguments = overrides(data, folder, *ONE_A_ROW, f"train.seq_len={seq_len}", *layout(**sizes), *more)
    num_ranks = sizes.get("pp", 1) * sizes.get("dp", 1)
    first, *others = run_ranks(observe, num_ranks, arguments)
    assert all(other.rows == first.rows for other in others), "ranks report different figures"
    for other in others:
        first.biases.update(other.biases)
    return first


def test_more_padding_changes_nothing(one_a_row: Path, short: Observed, tmp_path: Path) -> None:
    long = run_padded(one_a_row, tmp_path, LONG)
    assert short.rows[0]["heads_clipped"] > 0
    assert long.rows == short.rows
    assert long.evaluation == short.evaluation
    assert_same_biases(long, short)
    assert all(map(torch.equal, long.weights, short.weights))


def assert_same_biases(found: Observed, expected: Observed) -> None:
    assert set(found.biases) == set(expected.biases)
    for layer, biases in expected.biases.items():
        assert biases[0].any()
        assert all(map(torch.equal, found.biases[layer], biases)), f"layer {layer}"


PARALLEL = {"pp": 2, "vpp": 2, "ep": 2, "dp": 2}
LAYOUTS: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "two sequences a micro-batch": ({}, ("train.micro_batch_size=2",)),
    "all parallel": (PARALLEL, ()),
    "all parallel and overlapped": (PARALLEL, EVERYTHING_OVERLAPS),
    "dp2": ({"dp": 2}, ()),
    "pp2, coupled tower": ({"pp": 2}, ("dep.mode=coupled",)),
    "in bubbles": ({"pp": 2, "dp": 2}, ("dep.schedule=bubbles",)),
}
ALWAYS = ("two sequences a micro-batch", "all parallel and overlapped")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_more_padding_changes_nothing_in_parallel(
    name: str, one_a_row: Path, short: Observed, tmp_path: Path
) -> None:
    """Against one process with less of it: ranks and micro-batches have different numbers of real tokens."""
    sizes, more = LAYOUTS[name]
    long = run_padded(one_a_row, tmp_path, LONG, *more, **sizes)
    for found, expected in zip(long.rows, short.rows, strict=True):
        for key, value in expected.items():
            # How items are divided over ranks is what the layout changes.
            if not key.startswith("vision_") or key == "vision_tokens":
                assert found[key] == pytest.approx(value, rel=1e-6), key
        for key in ("tokens", "text_tokens", "vision_tokens", "images", "patches", "flops", "heads_clipped"):
            assert found[key] == expected[key], key
    assert long.evaluation == pytest.approx(short.evaluation, rel=1e-6)
    assert_same_biases(long, short)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["k2", "keep"])
def test_more_padding_changes_nothing_that_is_stored(
    activation: str, one_a_row: Path, tmp_path: Path
) -> None:
    """In FP8 tiles, which are of one token."""
    choice = f"activation={activation}"
    short, long = (run_padded(one_a_row, tmp_path / str(n), n, choice) for n in (SHORT, LONG))
    assert long.rows == short.rows
