"""What adding weight gradients by a kernel of their own would move."""

import pytest

from k25_train.compose.resolve import compose
from k25_train.plan.time.weight_gradients import expert_weight_gradient_bytes

MEMORY_GB_PER_S = 2850
"""What an H800 reaches when it adds tensors: 85% of 3.35 TB/s."""


def test_a_layer_of_kimi_k25_moves_ten_gigabytes_less_per_micro_batch() -> None:
    config = compose(["experiment=k25_pretrain_4k"])
    local_experts = config.model.num_experts // config.parallelism.ep
    moved = expert_weight_gradient_bytes(config.model, config.train.dtype, local_experts)
    assert local_experts == 24
    assert moved.added == 10_569_646_080
    assert moved.temporary == 1_409_286_144
    assert moved.accumulating - moved.written == 6_341_787_648, "moved by the products instead"
    # 4 layers of a stage, 1,024 micro-batches: 15 of the 138 seconds that model FLOPs take at 256 GPUs.
    assert moved.added / MEMORY_GB_PER_S / 1e9 * 4 * 1024 == pytest.approx(15.2, abs=0.1)
