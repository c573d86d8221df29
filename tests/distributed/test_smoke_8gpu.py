"""The experiment for one node of eight GPUs, on as many CPU ranks, trains like one process."""

from pathlib import Path

import pytest

from tests.helpers.parity import assert_first_loss_agrees, worst_difference
from tests.helpers.runs import SHRUNK, losses_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ON_CPU = "cluster=local cluster.gpus_per_node=8 train.transformer_engine=false train.dtype=float32"
SHORT = "train.steps=5 train.global_batch_size=16 train.trace_step=null optim.warmup=1 optim.decay=1"
ALONE = "parallelism=serial cluster.gpus_per_node=1 dep.mode=coupled optim.offload=none"
FP8_TOLERANCE = 1e-3
"""Largest relative difference of a loss or a gradient norm: a value near the middle of two FP8 numbers
becomes the other one for a difference of 1e-7 before."""


def test_eight_ranks_agree_with_one(data: Path, tmp_path: Path) -> None:
    command = ["experiment=smoke_8gpu", *SHRUNK[1:], *ON_CPU.split(), *SHORT.split(), f"data.dir={data}"]
    eight = losses_of([*command, f"run.dir={tmp_path}/eight"], 8)
    alone = losses_of([*command, *ALONE.split(), f"run.dir={tmp_path}/alone"], 1)
    assert_first_loss_agrees(eight, alone)
    assert worst_difference(eight, alone) <= FP8_TOLERANCE
    exact = ["activation=keep"]
    eight, alone = (
        losses_of([*command, *exact, f"run.dir={tmp_path}/8"], 8),
        losses_of([*command, *exact, *ALONE.split(), f"run.dir={tmp_path}/1"], 1),
    )
    assert worst_difference(eight, alone) <= 1e-5
