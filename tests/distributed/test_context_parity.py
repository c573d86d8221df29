"""Ranks that share sequences train, evaluate and report like one process that has them whole."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from parallel.context.plan import ContextPlan, Piece
from tests.helpers.exported_run import evaluate_alone
from tests.helpers.parity import CLIPPED, CONTEXT_CASES, COUPLED, TOLERANCE, Case, Parity, worst_difference
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run
from tests.helpers.smoke_mix import mix
from tests.helpers.tiny_shards import Sample, make_image, make_text, write_shard_set

pytestmark = pytest.mark.distributed

THREE_STEPS = ("train.steps=3", "optim.warmup=1", "optim.decay=1")
SMALL = {"num_layers": 4, "global_batch_size": 8}
"""Sizes of what is always run."""
COUNTS = ("model.balance_loss_coeff=0.1", *CLIPPED)
"""Changes with which the balance loss and QK-Clip count."""


@pytest.mark.parametrize("case", CONTEXT_CASES[:2], ids=lambda case: case.name)
def test_ranks_that_share_sequences_train_like_one_process(case: Case, parity: Parity) -> None:
    assert parity.difference(replace(case, **SMALL), *COUNTS, *THREE_STEPS) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", CONTEXT_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("changes", [COUNTS, ("optim=adamw",)], ids=["muonclip", "adamw"])
def test_they_do_for_twenty_steps(case: Case, changes: Sequence[str], parity: Parity) -> None:
    assert parity.difference(case, *changes) <= TOLERANCE


class Seen(NamedTuple):
    """Of a run on one rank."""

    losses: list[tuple[float, float]]
    """Loss and gradient norm of each step."""
    evaluation: dict[str, float]
    """Held-out losses after the last one."""
    counts: list[tuple[int, int]]
    """Of each micro-batch, the rank's tokens with a loss, and all but padding."""
    totals: list[tuple[int, int]]
    """Of each step, these tokens of the global batch."""


def in_order(lengths: Sequence[int], padding: Sequence[int], num_ranks: int) -> ContextPlan:
    """Consecutive tokens for each rank: the first one has images, the last one padding alone."""
    share = sum(lengths) // num_ranks
    pieces: list[tuple[Piece, ...]] = []
    for rank in range(num_ranks):
        first, own = 0, []
        for document, length in enumerate(lengths):
            start, stop = max(rank * share - first, 0), min((rank + 1) * share - first, length)
            own += [Piece(document, start, stop)] if stop > start else []
            first += length
        pieces.append(tuple(own))
    return ContextPlan(tuple(lengths), frozenset(padding), tuple(pieces))


def train_in_order(context: RankContext, arguments: Sequence[str]) -> Seen:
    from k25_train.data import context as shares
    from k25_train.training.evaluation import eval_losses
    from k25_train.training.step import train_step

    shares.plan_context = in_order
    run = start_run(context, arguments)
    counts: list[tuple[int, int]] = []
    totals: list[tuple[int, int]] = []
    read, pad = run.reader.step, run.data.loader.tokenizer.pad

    def counted(step: int) -> object:
        inputs = read(step)
        totals.append(tuple(inputs.tokens))
        counts.extend(
            (int(batch.targets.loss_mask.sum()), int((batch.tokens != pad).sum()))
            for batch in inputs.micro_batches
        )
        return inputs

    run.reader.step = counted
    with run.data:
        results = [train_step(run, step) for step in range(1, run.config.train.steps + 1)]
        evaluation = eval_losses(run, run.config.train.eval_sequences)
    return Seen([(each.loss, each.grad_norm) for each in results], evaluation, counts, totals)


@pytest.fixture(scope="module")
def one_a_row(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of more than half a sequence: two images, a text, and padding behind them."""
    splits = {
        split: [
            Sample(
                f"{i}",
                "caption",
                [*(make_image(112, 112, "png", 2 * i + j) for j in (0, 1)), make_text(9 + i % 3, i)],
            )
            for i in range(start, start + count)
        ]
        for split, start, count in (("train", 100, 24), ("heldout", 1100, 12))
    }
    return write_shard_set(tmp_path_factory.mktemp("one_a_row"), splits)


@pytest.mark.parametrize(
    "sizes",
    [{"cp": 4}, pytest.param({"pp": 2, "cp": 2, "ep": 2}, marks=pytest.mark.slow)],
    ids=["cp4", "pp2 ep2 cp2"],
)
def test_ranks_without_targets_and_with_padding_alone_take_part(
    sizes: dict[str, int], one_a_row: Path, tmp_path: Path
) -> None:
    """Where means of ranks are averaged, a target weighs the less the more ranks have none: megatron-core
    0.19.2 without `calculate_per_token_loss` (Megatron-LM #7452, #7513)."""
    few = (*mix(caption=1), "train.seq_len=112", "train.eval_sequences=4", "train.global_batch_size=4")
    changes = (*few, *COUNTS, *THREE_STEPS, "model.num_layers=4", "optim.lr=1e-3", COUPLED)
    [alone] = run_ranks(train_in_order, 1, overrides(one_a_row, tmp_path / "one", *layout(), *changes))
    num_ranks = sizes["cp"] * sizes.get("pp", 1)
    command = overrides(one_a_row, tmp_path / "shared", *layout(**sizes), *changes)
    shared = run_ranks(train_in_order, num_ranks, command, timeout_s=240.0)
    for seen in shared:
        assert worst_difference(seen.losses, alone.losses) <= TOLERANCE
        assert seen.totals == alone.totals, "a token is counted by several ranks, or by none"
        assert seen.evaluation == pytest.approx(alone.evaluation, rel=TOLERANCE)
    if num_ranks == 4 and "pp" not in sizes:
        assert all(targets == 0 < tokens for targets, tokens in shared[0].counts), "images have no loss"
        assert any(tokens == 0 for _, tokens in shared[3].counts), "no rank has padding alone"
        whole = [sum(each) for each in zip(*(sum(seen.counts, ()) for seen in shared), strict=True)]
        assert whole == list(sum(alone.counts, ())), "a token is computed on twice, or not at all"


def test_a_checkpoint_is_evaluated_by_ranks_that_share_sequences(run_alone: Path, tmp_path: Path) -> None:
    """Losses of tokens are put together in order: whoever reads the files sees whole micro-batches."""
    checkpoint, few = str(run_alone / "checkpoints/step_10"), "train.eval_sequences=4"
    [expected] = run_ranks(evaluate_alone, 1, checkpoint, few, f"dump={tmp_path / 'alone'}")
    shared = run_ranks(
        evaluate_alone, 4, checkpoint, few, "parallelism.cp=2", f"dump={tmp_path / 'shared'}", timeout_s=240.0
    )
    assert shared == [pytest.approx(expected, rel=TOLERANCE)] * 4
    files = [f"batch_{replica}_{number}.safetensors" for replica in (0, 1) for number in (0, 1)]
    assert sorted(each.name for each in (tmp_path / "shared").iterdir()) == files
    for number, name in enumerate(files):
        found = load_file(tmp_path / "shared" / name)
        alone = load_file(tmp_path / f"alone/batch_0_{number}.safetensors")
        counts = found["loss_mask"] > 0
        losses, as_alone = found.pop("losses")[counts], alone.pop("losses")[counts]
        assert len(losses) > 20 and as_alone.std() > 0.1, "losses that are all alike would hide their order"
        torch.testing.assert_close(losses, as_alone, rtol=1e-5, atol=1e-6)
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[each], alone[each]) for each in found)


def waits_for_latents(context: RankContext, arguments: Sequence[str]) -> set[str]:
    """Whom a rank waits for in phases of that name, in a step."""
    from k25_train.training.step import train_step
    from parallel.watchdog.recorder import Recorder

    run = start_run(context, arguments)
    with run.data:
        recorder = run.tracker.recorder = Recorder()
        train_step(run, 1)
    return {span.peers for span in recorder.spans if span.name == "latents"}


@pytest.mark.parametrize("exchange", ["ring", pytest.param("all_gather", marks=pytest.mark.slow)])
def test_whoever_waits_for_latents_says_for_whom(exchange: str, data: Path, tmp_path: Path) -> None:
    """The report of a stall names the ranks that nobody waits for; the timeline has a colour for it."""
    small = ("model.num_layers=2", "train.global_batch_size=2", *THREE_STEPS, COUPLED)
    short = (*small, f"parallelism.cp_exchange={exchange}")
    command = overrides(data, tmp_path, *layout(cp=2), *short)
    assert run_ranks(waits_for_latents, 2, command) == [{"rank 1"}, {"rank 0"}]
