"""AdamW of state that streams, chunk by chunk, against torch's on whole tensors."""

import pytest
import torch
from torch import Tensor

from k25_train.optim import streamed_adamw
from k25_train.optim.streamed_adamw import ADAM_STATE_KEYS, StreamedAdamW
from parallel.host.copier import ThreadCopier
from parallel.host.state_stream import StateStream
from parallel.megatron.state_store import HostShard, HostStore

SIZES = (1, 7, 64, 1000, 12345)
NUM_STEPS = 6


def groups(weights: list[Tensor]) -> list[dict]:
    common = {"betas": (0.9, 0.95), "eps": 1e-8, "lr": 1e-2}
    return [
        {"params": weights[:2], "weight_decay": 0.0, **common},
        {"params": [], "weight_decay": 0.0, **common},
        {"params": weights[2:], "weight_decay": 0.1, **common},
    ]


def start() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator) for size in SIZES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(size, generator=generator) * 10.0 ** (-step % 5) for size in SIZES]


def train_plainly() -> tuple[list[Tensor], torch.optim.Optimizer]:
    masters = start()
    plain = torch.optim.AdamW(groups(masters), fused=True)
    for step in range(NUM_STEPS):
        for group in plain.param_groups:
            group["lr"] = 1e-2 * (step + 1)
        for master, gradient in zip(masters, gradients(step), strict=True):
            master.grad = gradient
        plain.step()
    return masters, plain


@pytest.mark.parametrize("chunk_elements", [300, 1 << 20])
def test_chunks_train_as_whole_tensors_do(chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the shards, the largest in many chunks; weights are the masters in their own format."""
    monkeypatch.setattr(streamed_adamw, "CHUNK_ELEMENTS", chunk_elements)
    copier = ThreadCopier(timeout_s=60.0)
    store, masters = HostStore(StateStream(copier)), start()
    for master in masters:
        weights = torch.zeros(master.numel(), dtype=torch.bfloat16)
        store.add(HostShard(master, torch.zeros_like(master), weights, start=0))
    streamed, lane, lanes = StreamedAdamW(groups(masters), store), store.lane, list[int]()
    monkeypatch.setattr(store, "lane", lambda number: lanes.append(number) or lane(number))
    for master in masters:
        streamed.state[master] = {key: torch.zeros_like(master) for key in ADAM_STATE_KEYS}
    for step in range(NUM_STEPS):
        for group in streamed.param_groups:
            group["lr"] = 1e-2 * (step + 1)
        for shard, gradient in zip(store.shards(), gradients(step), strict=True):
            shard.gradient.copy_(gradient)
        streamed.step()
    store.stream.settle()
    copier.close()
    assert max(lanes) == 3 * min(chunk_elements, sum(SIZES))
    expected, plain = train_plainly()
    for shard, whole in zip(store.shards(), expected, strict=True):
        # A chunk's last elements go through the kernel's scalar path.
        torch.testing.assert_close(shard.master, whole, rtol=1e-6, atol=1e-7)
        assert torch.equal(shard.weights, shard.master.bfloat16())
        state = streamed.state[shard.master]
        for key in ADAM_STATE_KEYS:
            torch.testing.assert_close(state[key], plain.state[whole][key], rtol=1e-6, atol=1e-12)
        assert state["step"].item() == NUM_STEPS
    assert [group.get("step") for group in streamed.param_groups] == [NUM_STEPS, None, NUM_STEPS]
