"""MuonClip written down plainly from the papers, one whole parameter after another, in one process.

K2 report (arXiv 2507.20534), algorithm 1 without the clip, and Nesterov's momentum if that is configured;
Moonlight (arXiv 2502.16982), section 2: five Newton-Schulz steps with 3.4445, -4.7750, 2.0315, Frobenius norm
first, transposed if there are more rows than columns; AdamW for what is no matrix, and for embeddings and
output head.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.ranks import RankContext
from tests.helpers.runs import start_run

ADAMW = re.compile(r"embedding|output_layer|norm|bias$|pos_emb|patch_embed")
"""Names of the parameters that Muon is not for."""


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz: all singular values of `matrix` [rows, cols] go near 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


def true_matrices(name: str, parameter: Tensor) -> Iterator[Tensor]:
    """Views of the matrices that a parameter is made of."""
    if parameter.dim() == 3:
        for expert in parameter:
            yield from expert.chunk(2) if name.endswith("gate_up_proj") else [expert]
    elif name.endswith("linear_fc1.weight"):
        yield from parameter.chunk(2)
    elif name.endswith("wqkv.weight"):
        yield from parameter.chunk(3)
    else:
        yield parameter


class PlainMuon:
    """The optimizer's state and step over a model's named parameters."""

    def __init__(self, model: nn.Module, optim: Any) -> None:
        self.model, self.optim = model, optim
        self.state: dict[str, list[Tensor]] = {}
        self.steps = 0

    @torch.no_grad()
    def step(self, rate: float) -> float:
        """Update from `main_grad`; returns the global gradient norm before clipping."""
        named = list(self.model.named_parameters())
        gradients = {name: parameter.main_grad.clone() for name, parameter in named}
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
        scale = min(1.0, self.optim.grad_clip / (norm + 1e-6))
        self.steps += 1
        for name, parameter in named:
            gradient = gradients[name] * scale
            if ADAMW.search(name) or parameter.dim() < 2:
                self._adamw(name, parameter, gradient, rate)
            else:
                self._muon(name, parameter, gradient, rate)
        return norm

    def _muon(self, name: str, parameter: Tensor, gradient: Tensor, rate: float) -> None:
        (momentum,) = self.state.setdefault(name, [torch.zeros_like(parameter)])
        momentum.mul_(0.95).add_(gradient)
        ahead = gradient + 0.95 * momentum if self.optim.muon.nesterov else momentum
        parts = zip(true_matrices(name, parameter), true_matrices(name, ahead), strict=True)
        for weight, direction in parts:
            update = orthogonal(direction) * 0.2 * math.sqrt(max(weight.shape))
            weight.sub_(rate * (update + self.optim.weight_decay * weight))

    def _adamw(self, name: str, parameter: Tensor, gradient: Tensor, rate: float) -> None:
        first, second = self.state.setdefault(name, [torch.zeros_like(parameter) for _ in range(2)])
        beta1, beta2 = self.optim.beta1, self.optim.beta2
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (second / (1 - beta2**self.steps)).sqrt() + self.optim.eps
        if parameter.dim() > 1:
            parameter.mul_(1 - rate * self.optim.weight_decay)
        parameter.sub_(rate * (first / (1 - beta1**self.steps)) / root)


def train_plainly(context: RankContext, arguments: Sequence[str]) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a run of one process whose optimizer is `PlainMuon`."""
    from k25_train.plan.schedule import Schedule
    from k25_train.training import step as steps

    # One module has all parameters, and what decouples the tower is not in the reference.
    run = start_run(context, [*arguments, "dep.mode=coupled"])
    (chunk,) = run.chunks
    plain = PlainMuon(chunk.module, run.config.optim)
    norms: list[float] = []
    schedule = Schedule(run.config.optim, run.config.train)

    def update() -> tuple[bool, float, None]:
        norms.append(plain.step(schedule.learning_rate(len(norms) + 1)))
        return True, norms[-1], None

    run.optimizer.step = update
    with run.data:
        results = [steps.train_step(run, step) for step in range(1, run.config.train.steps + 1)]
    return [(result.loss, result.grad_norm) for result in results]
