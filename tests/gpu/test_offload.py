"""`optim.offload=cpu` on a GPU: state rests in page-locked host memory, and trains as on the device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.gpu import alone, in_fresh_process, on_gpu
from tests.helpers.runs import start_run
from tests.helpers.tiny_shards import write_tiny_shard_set

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

STEPS = "train.steps=3 optim.warmup=0 optim.decay=0".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_shard_set(tmp_path_factory.mktemp("shards"))


def train_and_measure(arguments: Sequence[str]) -> dict[str, Any]:
    """Losses, bytes on the GPU between steps, and where masters, gradients and moments are."""
    from k25_train.training.step import train_step

    run = start_run(alone(), arguments)
    with run.data:
        losses = [train_step(run, step).loss for step in range(1, run.config.train.steps + 1)]
    parts = run.optimizer.chained_optimizers
    shards = [shard for part in parts if hasattr(part, "store") for shard in part.store.shards()]
    state = [
        value
        for part in parts
        for values in part.optimizer.state.values()
        for value in values.values()
        if torch.is_tensor(value)
    ]
    return {
        "losses": losses,
        "bytes": torch.cuda.memory_allocated(),
        "elements": sum(part.numel() for part in state if part.dim()) // 2,
        "state on": {tensor.device.type for tensor in state if tensor.dim()},
        "pinned": all(tensor.is_pinned() for tensor in state if tensor.dim() and not tensor.is_cuda),
        "shards": len(shards),
    }


def test_state_is_on_the_host_and_device_memory_falls(data: Path, tmp_path: Path) -> None:
    command = on_gpu(data, tmp_path, *STEPS)
    resident = in_fresh_process(train_and_measure, [*command, "optim.offload=none"])
    hosted = in_fresh_process(train_and_measure, [*command, "optim.offload=cpu"])

    assert resident["state on"] == {"cuda"}
    assert hosted["state on"] == {"cpu"}
    assert hosted["shards"] > 0
    assert hosted["pinned"]
    # A master and two moments in float32; torch rounds what it allocates up.
    assert resident["bytes"] - hosted["bytes"] >= 0.9 * 12 * hosted["elements"]
    assert hosted["losses"] == pytest.approx(resident["losses"], rel=1e-3)
