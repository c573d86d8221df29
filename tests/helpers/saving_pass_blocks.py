"""Blocks whose saved tensors have every shape that a `SavingPass` meets, and a run of them by policy."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.activations.annotate import named, recomputed, saves
from parallel.activations.offload import OffloadEngine
from parallel.activations.policy import Policy
from parallel.activations.saving_pass import SaveRecord, SavingPass
from parallel.activations.storage import weights_of
from parallel.pipeline.schedule import PassKey

NAMES = ("norm.input", "norm.output", "hidden", "swiglu.output", "attention", "rest")
CAN_REPLAY = ("norm.output", "swiglu.output")
KEY = PassKey(0, 0)


class Block(nn.Module):
    """Norm, two projections of it, SwiGLU of a view of one, attention: every shape of saved tensor."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) / 8)

        self.gain, self.gate_up, self.gate = weight(64), weight(256, 64), weight(64, 64)
        self.down = weight(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        x = named("norm.input", x)
        normed = recomputed("norm.output", lambda x: F.rms_norm(x, (64,), self.gain), x)
        gate_up = named("hidden", normed @ self.gate_up.T)
        scale = torch.sigmoid(normed @ self.gate.T).mean(-1, keepdim=True)
        product = recomputed("swiglu.output", swiglu, gate_up, scale)
        query = (product @ self.down.T).view(4, 32, 64)
        with saves("attention"):
            # The first half alone: a view whose memory is larger.
            attended = F.scaled_dot_product_attention(query[:2], query[2:], query[2:] * 2)
        return x[:64] + attended.reshape(64, 64)


def swiglu(gate_up: Tensor, scale: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up * scale


def run(
    policies: dict[str, Policy] | None,
    engine: OffloadEngine | None = None,
    observe: Callable[[SaveRecord], None] | None = None,
    device: str = "cpu",
) -> list[Tensor]:
    """Output and gradients of two blocks in a row; saved as torch does without policies."""
    blocks = [Block().to(device), Block().to(device)]
    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(2)).to(device).requires_grad_()

    def forward() -> Tensor:
        first = blocks[0](x)
        return blocks[1](torch.cat((first, 2 * first.flip(0))))

    if policies is None:
        output = forward()
    else:
        saving = SavingPass(policies, KEY, weights_of(blocks), engine, observe)
        with saving.active():
            output = forward()
        del saving
    output.square().sum().backward()
    assert x.grad is not None
    gradients = [p.grad for block in blocks for p in block.parameters()]
    return [output.detach(), x.grad, *[gradient for gradient in gradients if gradient is not None]]


def all_of(policy: Policy, **others: Policy) -> dict[str, Policy]:
    exact = Policy.keep if policy is Policy.recompute else policy
    found = {name: policy if name in CAN_REPLAY else exact for name in NAMES}
    return found | {name.replace("_", "."): other for name, other in others.items()}
