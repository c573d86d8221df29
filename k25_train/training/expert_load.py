"""How evenly routers load their experts in a step, and how far the biases that even it out have drifted.

megatron-core sums the counts to update the biases, on a copy, and forgets them at once. They are read just
before, and added up with the other sums of the step (`step_totals.py`), without a collective or a wait of
their own.

Shapes: L layers of the whole model, E experts of a layer, M of the layers that have experts.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from k25_train.config.model import ModelConfig
from parallel.megatron.patches.pass_hooks import PassHooks
from parallel.topology import Topology

PER_LAYER = 4
"""Figures of a layer: largest load, dead experts, largest bias before and after the step."""


@dataclass(frozen=True, slots=True)
class ExpertFigures:
    """The experts in one step, over all ranks; the same on every rank."""

    loads: tuple[float, ...]
    """[M] tokens of the layer's busiest expert over the mean of its experts; 1 is even. Padding counts in
    none. Empty where the model has no experts."""
    dead: int
    """Experts of all layers that got no token of the global batch."""
    bias: float
    """Largest absolute expert bias of all layers, after the step."""
    bias_change: float
    """By how much the step changed it."""


NO_EXPERTS = ExpertFigures(loads=(), dead=0, bias=0.0, bias_change=0.0)
"""Of a model without them."""


class ExpertLoad(PassHooks):
    """Reads this rank's routers at the end of the backward pass; subscribe it around the schedule."""

    def __init__(self, chunks: Iterable[nn.Module], model: ModelConfig, topology: Topology) -> None:
        """Find the routers in `chunks`, whatever wraps them."""
        self._shape = (model.num_layers, model.num_experts)
        self._routers: list[Any] = [
            module
            for chunk in chunks
            for module in chunk.modules()
            if isinstance(getattr(module, "local_tokens_per_expert", ""), Tensor)
        ]
        # Ranks of a stage have the same biases: one of them tells.
        self._tells_biases = topology.groups.dp_cp.rank() == 0
        self._device = topology.device
        self._clear()

    def _clear(self) -> None:
        num_layers, _ = self._shape
        zeros = {"dtype": torch.float64, "device": self._device}
        self._counts_LE = torch.zeros(self._shape, **zeros)  # type: ignore[call-overload]
        self._biases_2L = torch.zeros(2, num_layers, **zeros)  # type: ignore[call-overload]

    @contextmanager
    def around_finalize(self) -> Iterator[None]:
        """Take the counts, and the largest biases before and after they are moved."""
        for router in self._routers:
            self._counts_LE[router.layer_number - 1] = router.local_tokens_per_expert
        self._read_biases(0)
        yield
        self._read_biases(1)

    @torch.no_grad()
    def _read_biases(self, moment: int) -> None:
        for router in self._routers if self._tells_biases else ():
            self._biases_2L[moment, router.layer_number - 1] = router.expert_bias.abs().amax()

    def take(self) -> Tensor:
        """What this rank adds to the step's figures, [L * (E + 2)] float64, which it forgets."""
        own = torch.cat([self._counts_LE.flatten(), self._biases_2L.flatten()])
        self._clear()
        return own

    def by_layer(self, total: Tensor) -> Tensor:
        """Figures [L * PER_LAYER] from what all ranks have added up; nothing waits for the device."""
        num_layers, num_experts = self._shape
        counts, biases = total.split([num_layers * num_experts, 2 * num_layers])
        counts_LE = counts.view(self._shape)
        loads_L = counts_LE.amax(1) / counts_LE.mean(1)
        dead_L = (counts_LE == 0).sum(1).double()
        return torch.stack([loads_L, dead_L, *biases.view(2, num_layers)]).flatten()

    def figures(self, by_layer: list[float]) -> ExpertFigures:
        """The figures on the host; layers without experts, or without a token, have none."""
        num_layers, _ = self._shape
        loads, dead, before, after = (
            by_layer[start : start + num_layers] for start in range(0, PER_LAYER * num_layers, num_layers)
        )
        # A layer without experts has counted nothing: 0 / 0.
        counted = [layer for layer, load in enumerate(loads) if load == load]
        if not counted:
            return NO_EXPERTS
        return ExpertFigures(
            loads=tuple(loads[layer] for layer in counted),
            dead=int(sum(dead[layer] for layer in counted)),
            bias=max(after),
            bias_change=max(after) - max(before),
        )
