"""An interrupted run goes on as if nothing had happened: bitwise in its layout, to 1e-5 in another."""

import os
import random
import signal
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.interrupted_runs import (
    FOUR_RANKS,
    ONE_RANK,
    SHORT,
    TOLERANCE,
    assert_close,
    assert_goes_on,
    assert_same_state,
    cut_off,
    rows,
    short_run,
)
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import fit, start_run
from tests.helpers.smoke_mix import mix

pytestmark = pytest.mark.distributed


def fit_and_signal(context: RankContext, arguments: Sequence[str], rank: int, step: int) -> None:
    """Train; one rank gets SIGUSR1 while it works on `step`."""
    from k25_train.training import trainer

    train_step = trainer.train_step

    def train_step_under_signal(run: Any, current: int) -> Any:
        if (context.rank, current) == (rank, step):
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_step(run, current)

    trainer.train_step = train_step_under_signal
    fit(context, arguments)


def fit_with_other_generators(context: RankContext, arguments: Sequence[str]) -> None:
    """Train with all global generators somewhere else before each step, which must leave them there."""
    import numpy as np
    import torch

    from k25_train.training import trainer

    train_step = trainer.train_step

    def states() -> list[Any]:
        legacy = np.random.get_state(legacy=True)
        return [random.getstate(), legacy[0], legacy[1].tolist(), legacy[2:], torch.get_rng_state().tolist()]

    def train_step_elsewhere(run: Any, current: int) -> Any:
        random.seed(current)
        np.random.seed(current)
        torch.manual_seed(current)
        before = states()
        result = train_step(run, current)
        assert states() == before, f"step {current} has drawn from a global generator"
        return result

    trainer.train_step = train_step_elsewhere
    fit(context, arguments)


def fit_and_listen(context: RankContext, arguments: Sequence[str]) -> str:
    """Train; returns what is printed."""
    printed = StringIO()
    with redirect_stdout(printed):
        fit(context, arguments)
    return printed.getvalue()


def outcomes_of_starts(
    context: RankContext, arguments: Sequence[str], cases: Sequence[str]
) -> dict[str, str]:
    """For further overrides, separated by spaces: the step from which the run goes on, or its error."""
    from k25_train.compose.resolve import compose
    from k25_train.errors import K25Error
    from k25_train.metrics.report import Report
    from k25_train.training.trainer import Trainer

    run = start_run(context, arguments)
    outcomes = {}
    for case in cases:
        config = compose([*arguments, *case.split()])
        report = Report(config, is_main=run.is_main, device_name="CPU")
        try:
            step = Trainer(replace(run, config=config), report).keeper.resume()
            outcomes[case] = f"step {step}, weight decay {run.optimizer.param_groups[0]['weight_decay']}"
        except K25Error as error:
            outcomes[case] = f"{type(error).__name__}: {error}"
    return outcomes


def evaluate_checkpoint(
    _context: RankContext, checkpoint: str, dump: str, num_sequences: Sequence[int]
) -> list[tuple[float, ...]]:
    """Text and caption loss as `k25_train.eval` computes them; the first evaluation dumps its batches."""
    from k25_train.eval import evaluate, read_arguments

    arguments = [[f"checkpoint={checkpoint}", f"train.eval_sequences={number}"] for number in num_sequences]
    arguments[0].append(f"dump={dump}")
    found = [evaluate(*read_arguments(each)) for each in arguments]
    return [(losses["eval_text_loss"], losses["eval_caption_loss"]) for losses in found]


def test_one_process_goes_on_bitwise_whatever_generators_say(
    data: Path, run_alone: Path, tmp_path: Path
) -> None:
    resumed = cut_off(run_alone, tmp_path / "run")

    run_ranks(fit_with_other_generators, 1, short_run(data, resumed, *ONE_RANK))

    assert_goes_on(resumed, run_alone, after=SHORT.saved_at)
    assert_same_state(resumed, run_alone)
    assert sorted(path.name for path in (resumed / "checkpoints").glob("step_*")) == ["step_10", "step_5"]


def test_a_signal_to_one_of_four_ranks_stops_all_and_they_go_on_bitwise(
    data: Path, run_as_smoke: Path, tmp_path: Path
) -> None:
    resumed = cut_off(run_as_smoke, tmp_path / "run")

    run_ranks(fit_and_signal, 4, short_run(data, resumed, *FOUR_RANKS), 2, 8)

    assert rows(resumed)[-1]["step"] == 8
    assert sorted(path.name for path in (resumed / "checkpoints").glob("step_*")) == ["step_5", "step_8"]

    run_ranks(fit, 4, short_run(data, resumed, *FOUR_RANKS))

    assert_goes_on(resumed, run_as_smoke, after=SHORT.saved_at)
    assert_same_state(resumed, run_as_smoke)


def test_four_ranks_go_on_in_one_process(data: Path, run_as_smoke: Path, tmp_path: Path) -> None:
    resumed = cut_off(run_as_smoke, tmp_path / "run")

    run_ranks(fit, 1, short_run(data, resumed, *ONE_RANK))

    assert_close(resumed, run_as_smoke, after=SHORT.saved_at)


def test_one_process_goes_on_in_four_ranks(data: Path, run_alone: Path, tmp_path: Path) -> None:
    resumed = cut_off(run_alone, tmp_path / "run")

    run_ranks(fit, 4, short_run(data, resumed, *FOUR_RANKS))

    assert_close(resumed, run_alone, after=SHORT.saved_at)


def test_a_finished_run_says_so_and_touches_nothing(data: Path, run_alone: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_alone.rglob("*")}

    (printed,) = run_ranks(fit_and_listen, 1, short_run(data, run_alone, *ONE_RANK))

    assert f"{run_alone}: all 10 steps are done" in printed
    assert {path: path.stat().st_mtime_ns for path in run_alone.rglob("*")} == before


def test_eval_finds_the_losses_of_the_run_and_dumps_them(run_as_smoke: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    checkpoint = run_as_smoke / f"checkpoints/step_{SHORT.num_steps}"
    ((all_four, only_two),) = run_ranks(
        evaluate_checkpoint, 1, str(checkpoint), str(tmp_path / "dump"), [4, 2]
    )

    last = rows(run_as_smoke)[-1]
    assert all_four == pytest.approx((last["eval_text_loss"], last["eval_caption_loss"]), rel=TOLERANCE)
    batches = [load_file(file) for file in (tmp_path / "dump").iterdir()]
    assert len(batches) == 4
    for is_caption, expected in ((False, all_four[0]), (True, all_four[1])):
        counted = [batch["loss_mask"] * ((batch["source"] != 0) == is_caption) for batch in batches]
        losses = sum(
            float((batch["losses"] * mask).sum()) for batch, mask in zip(batches, counted, strict=True)
        )
        assert losses / sum(float(mask.sum()) for mask in counted) == pytest.approx(expected, rel=TOLERANCE)
    # Two sequences are one of text and one with media, the first of each kind.
    assert all(1 < loss < 9 for loss in only_two)
    assert only_two != all_four


def test_eval_of_an_absent_checkpoint_names_those_that_exist(run_alone: Path) -> None:
    from k25_train.errors import CheckpointError
    from k25_train.eval import read_arguments

    with pytest.raises(CheckpointError, match=r"step_7: no such checkpoint; .* holds step_5, step_10"):
        read_arguments([f"checkpoint={run_alone}/checkpoints/step_7"])


MIXED = " ".join(mix(text=0.31, caption=0.3, ocr=0.1, video=0.29))
SHORTER = "train.steps=4 optim.warmup=0 optim.decay=0"
OUTCOMES = {
    "": "step 5, weight decay 0.5",
    "train.steps=30": "step 5, weight decay 0.5",
    "train.seed=8": "CheckpointError: {checkpoint} was trained with another configuration:\n  train.seed=",
    "model.hidden_size=128": "\n  model.hidden_size=64 in the checkpoint, 128 now\n",
    "model.num_layers=4": "\n  model.num_layers=5 in the checkpoint, 4 now\n",
    "train.global_batch_size=8 train.seq_len=64": "\n  train.global_batch_size=4 in the checkpoint, 8 now\n",
    MIXED: "step 5, weight decay 0.5",
    "data.sources.ocr.kinds=[text]": "\n  data.sources.ocr.kinds=['ocr'] in the checkpoint, ['text'] now\n",
    "checkpoint.resume=false": "ConfigError: checkpoint.resume=false, but an earlier run left {checkpoint}",
    SHORTER: "ConfigError: train.steps=4, but the run has {checkpoint}: raise train.steps",
    "run.dir={run}/no_file": "no_file/checkpoints/step_5/rank_00000_0.safetensors is missing",
    "run.dir={run}/cut": "cut/checkpoints/step_5/rank_00000_0.safetensors has 1000 bytes instead",
    "run.dir={run}/no_list": "CheckpointError: {run}/no_list/checkpoints/step_5/manifest.json: missing",
}
"""Overrides of a start with a checkpoint at step 5, where the optimizer is set otherwise than before -> what
must be in the outcome."""


@pytest.fixture(scope="module")
def starts(
    data: Path, run_alone: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    run = cut_off(run_alone, tmp_path_factory.mktemp("starts") / "run")
    for name in ("no_file", "cut", "no_list"):
        cut_off(run_alone, run / name)
    (run / "no_file/checkpoints/step_5/rank_00000_0.safetensors").unlink()
    os.truncate(run / "cut/checkpoints/step_5/rank_00000_0.safetensors", 1000)
    (run / "no_list/checkpoints/step_5/manifest.json").unlink()
    cases = [case.format(run=run) for case in OUTCOMES]
    other_optimizer = ["optim.lr=1e-3", "optim.weight_decay=0.5"]
    (outcomes,) = run_ranks(outcomes_of_starts, 1, short_run(data, run, *ONE_RANK, *other_optimizer), cases)
    return run, outcomes


@pytest.mark.parametrize("case", OUTCOMES)
def test_a_start_goes_on_or_says_why_not(case: str, starts: tuple[Path, dict[str, str]]) -> None:
    run, outcomes = starts
    expected = OUTCOMES[case].format(run=run, checkpoint=run / "checkpoints/step_5")
    assert expected in outcomes[case.format(run=run)]
