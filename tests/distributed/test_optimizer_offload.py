"""State that rests in the host trains bitwise as on the device, from and into the same checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.interrupted_runs import (
    FOUR_RANKS,
    ONE_RANK,
    SHORT,
    assert_close,
    assert_goes_on,
    cut_off,
    short_run,
)
from tests.helpers.optimizer_on_host import ON_DEVICE, ON_HOST
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import fit, layout, overrides, start_run

pytestmark = pytest.mark.distributed


def train_and_look(
    context: RankContext, arguments: Sequence[str]
) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Loss and norm of each step, and where the optimizer's tensors are."""
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    with run.data:
        results = [train_step(run, step) for step in range(1, run.config.train.steps + 1)]
    weights = {
        tensor.untyped_storage().data_ptr()
        for chunk in run.chunks
        for buffer in chunk.buffers + chunk.expert_parallel_buffers
        for tensor in (buffer.param_data, buffer.grad_data)
    }
    masters = [master for group in run.optimizer.param_groups for master in group["params"]]
    looks = {
        "inner": {type(part.optimizer).__name__ for part in run.optimizer.chained_optimizers},
        "apart": all(master.untyped_storage().data_ptr() not in weights for master in masters),
        "dtypes": {str(master.dtype) for master in masters},
        "rounding": max(
            float((shard.master - shard.weights).abs().max())
            for part in run.optimizer.chained_optimizers
            for shard in part.shards().values()
        ),
    }
    return [(result.loss, result.grad_norm) for result in results], looks


FEW = "train.steps=5 optim.warmup=2 optim.decay=2 optim.grad_clip=0.5".split()
"""The gradient norm is above 1: every step clips."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_host_steps_as_the_device_does(dtype: str, data: Path, tmp_path: Path) -> None:
    command = overrides(data, tmp_path, *layout(ep=2, dp=2), *FEW, f"train.dtype={dtype}")
    ((resident, _), _), ((hosted, looks), _) = (
        run_ranks(train_and_look, 2, [*command, place]) for place in (ON_DEVICE, ON_HOST)
    )
    assert hosted == resident
    assert looks["apart"]
    assert looks["dtypes"] == {"torch.float32"}
    # Parameters are their masters, rounded.
    assert (looks["rounding"] == 0) == (dtype == "float32")


def test_runs_go_on_with_and_without_offload_bitwise(data: Path, run_as_smoke: Path, tmp_path: Path) -> None:
    """From the device to the host, and from there back to the device, in one process."""
    hosted = cut_off(run_as_smoke, tmp_path / "hosted")
    between = SHORT.saved_at + 2

    command = short_run(data, hosted, *FOUR_RANKS, f"checkpoint.interval={between}", "checkpoint.keep=3")
    run_ranks(fit, 4, [*command, ON_HOST])

    assert_goes_on(hosted, run_as_smoke, after=SHORT.saved_at)
    resident = cut_off(hosted, tmp_path / "resident")
    run_ranks(fit, 1, short_run(data, resident, *ONE_RANK))
    assert_close(resident, run_as_smoke, after=between)
