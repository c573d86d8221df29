"""The plan of a global batch is made once per step, and once per evaluation, whoever needs it."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run
from tests.helpers.smoke_mix import mix

pytestmark = pytest.mark.distributed

NUM_SEQUENCES = 16_384
LARGE_BATCH_OF_TEXT = (
    f"train.global_batch_size={NUM_SEQUENCES}",
    "train.micro_batch_size=1024",
    "train.seq_len=8",
    "model.num_layers=1",
    "optim.qk_clip_threshold=null",
    *mix(text=1),
    "train.eval_sequences=1024",
    "train.steps=2",
    "optim.warmup=1",
    "optim.decay=1",
    "data.prefetch_steps=0",
)
FEW_STEPS = ("train.steps=3", "optim.warmup=1", "optim.decay=1", "data.prefetch_steps=2")


def plans_of_a_run(context: RankContext, arguments: list[str], num_steps: int) -> tuple[list[int], int]:
    """The steps that this rank planned, and its number of evaluations, in some steps and one evaluation."""
    from k25_train.training.evaluation import eval_losses
    from k25_train.training.rows import metrics_row
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    planned: list[int] = []
    plan, plan_evaluation, num_evaluations = run.data.loader.plan, run.data.loader.plan_evaluation, 0

    def counted(step: int) -> Any:
        planned.append(step)
        return plan(step)

    def counted_evaluation(*arguments: Any) -> Any:
        nonlocal num_evaluations
        num_evaluations += 1
        return plan_evaluation(*arguments)

    run.data.loader.plan, run.data.loader.plan_evaluation = counted, counted_evaluation
    with run.data:
        for step in range(1, num_steps + 1):
            row = metrics_row(run.config, step, train_step(run, step), is_mixed_anew=False)
            assert row["tokens"] == plan(step - 1).sizes().num_tokens
        eval_losses(run, run.config.train.eval_sequences)
    # Threads plan ahead, so the first steps may swap.
    return sorted(planned), num_evaluations


def test_a_step_of_16384_sequences_is_planned_once(data: Path, tmp_path: Path) -> None:
    arguments = overrides(data, tmp_path, *layout(), *LARGE_BATCH_OF_TEXT)
    assert run_ranks(plans_of_a_run, 1, arguments, 1, timeout_s=240.0) == [([0], 1)]


@pytest.mark.parametrize("tower", ["dep.mode=coupled", "dep.schedule=upfront", "dep.schedule=bubbles"])
def test_every_rank_plans_each_step_once(tower: str, data: Path, tmp_path: Path) -> None:
    arguments = overrides(data, tmp_path, *layout(pp=2, dp=1), tower, *FEW_STEPS)
    assert run_ranks(plans_of_a_run, 2, arguments, 3) == [([0, 1, 2], 1)] * 2
