"""Fake CUDA tensors behave as CUDA tensors do, and what blocks is seen: in forward and backward passes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.fake_cuda import fake_cuda
from tests.helpers.fake_cuda_seen import Seen
from tests.helpers.ranks import RankContext, run_ranks

pytestmark = pytest.mark.distributed


def reads_in_backward(value: Tensor) -> Tensor:
    class Read(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * gradient.sum().item()

    return Read.apply(value)  # type: ignore[no-any-return]


BLOCKING: dict[str, Any] = {
    "item": lambda x, host: x.sum().item(),
    "bool": lambda x, host: bool(x.sum() > 0),
    "tolist": lambda x, host: x.tolist(),
    "cpu": lambda x, host: x.cpu(),
    "to the host, pageable": lambda x, host: x.to("cpu", non_blocking=True),
    "to the device": lambda x, host: host.to(x.device),
    "to the device, pageable": lambda x, host: host.to(x.device, non_blocking=True),
    "a list": lambda x, host: torch.tensor([1.0, 2.0], device=x.device),
    "a number": lambda x, host: torch.as_tensor(0.5, device=x.device),
    "copy_": lambda x, host: x.copy_(host),
    "nonzero": lambda x, host: (x > 0).nonzero(),
    "a mask": lambda x, host: x[x > 0],
    "masked_select": lambda x, host: x.masked_select(x > 0),
    "indices of the host": lambda x, host: x[torch.tensor([1])],
    "repeat_interleave": lambda x, host: x.repeat_interleave(torch.ones_like(x, dtype=torch.long)),
    "torch.equal": lambda x, host: torch.equal(x, x),
    "device": lambda x, host: torch.cuda.synchronize(),
    "stream": lambda x, host: torch.cuda.current_stream().synchronize(),
    "event": lambda x, host: torch.cuda.Event().synchronize(),
}
FREE: dict[str, Any] = {
    "pinned to the device": lambda x, host: host.pin_memory().to(x.device, non_blocking=True),
    "to a pinned tensor": lambda x, host: torch.empty(4, pin_memory=True).copy_(x, non_blocking=True),
    "a part of a pinned tensor": lambda x, host: torch.empty(8, pin_memory=True)[4:].copy_(x, True),
    "made there": lambda x, host: torch.full((4,), 0.5, device=x.device) + x.new_zeros(4),
    "a number as operand": lambda x, host: x * 2.5 + torch.tensor(1.0),
    "a mask filled": lambda x, host: x.masked_fill(x > 0, 0.0),
    "size known": lambda x, host: x.repeat_interleave(
        torch.ones_like(x, dtype=torch.long), output_size=len(x)
    ),
}


def observe(context: RankContext) -> dict[str, Any]:
    """What each call above is seen to do, and a few passes."""
    found: dict[str, Any] = {"blocking": {}, "free": {}}
    for name, calls in (("blocking", BLOCKING), ("free", FREE)):
        for call, run in calls.items():
            with fake_cuda() as seen:
                x, host = torch.ones(4, device="cuda"), torch.arange(4.0)
                run(x, host)
            found[name][call] = seen.lines()
    with fake_cuda() as seen:
        found["gradient"] = passes(seen)
        found["lines"] = seen.lines()
        found["kernels"] = dict(seen.kernels)
    return found


def passes(seen: Seen) -> list[Any]:
    with seen.paused():
        layer = nn.Linear(2, 2, bias=False).to("cuda")
    layer.weight.data.fill_(3.0)
    x = torch.ones(2, 2, device="cuda", requires_grad=True)
    attended = F.scaled_dot_product_attention(x.view(1, 1, 2, 2), x.view(1, 1, 2, 2), x.view(1, 1, 2, 2))
    reads_in_backward(layer(x) + attended.view(2, 2)).sum().backward()
    assert layer.weight.grad is not None
    assert x.is_cuda
    assert layer.weight.grad.device == torch.device("cuda", 0)
    with seen.paused():
        return [layer.weight.grad.tolist(), torch.cuda.is_available()]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_ranks(observe, 1)[0]


def test_what_blocks_is_seen_once(found: dict[str, Any]) -> None:
    assert {name: len(lines) for name, lines in found["blocking"].items()} == dict.fromkeys(BLOCKING, 1)


def test_what_does_not_block_is_not(found: dict[str, Any]) -> None:
    assert found["free"] == {name: [] for name in FREE}


def test_backward_runs_with_right_values_and_is_seen_where_it_blocks(found: dict[str, Any]) -> None:
    # 2 * (sum of four gradients of 1) for each of two rows.
    assert found["gradient"] == [[[8.0, 8.0], [8.0, 8.0]], True]
    (line,) = found["lines"]
    assert "_local_scalar_dense" in line and line.endswith(" backward")
    assert found["kernels"]["aten.mm.default"] >= 2
