"""The encoder's two passes over one chunk of items.

The first keeps nothing but the features; the second computes the same again and goes backward. The tower has
no dropout, so both compute the same numbers without any random state. Either can be suspended between the
encoder's layers, so that passes of the pipeline can run in between.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from parallel.dep.grid import Grid
from parallel.pipeline.schedule import BACKWARD_COST, RECOMPUTE_AND_BACKWARD_COST

Layer = Callable[[Tensor], Tensor]
"""One step of an encoder: [P, C] hidden states in, the next ones out."""
Encode = Callable[[Tensor, tuple[Grid, ...]], Tensor]
"""Patches [P, 3*p*p] of items and their grids in, features [V, D] out, both item after item."""


class LayeredEncoder(Protocol):
    """An encoder that can be run step by step."""

    def layers(self, pixels: Tensor, grid_thw: tuple[Grid, ...], /) -> Sequence[Layer]:
        """`Encode` as steps of about equal duration: the first takes `pixels`, each other one what the one
        before it returns."""


class Chunk(NamedTuple):
    """Items that a rank encodes at once, or a part of one."""

    pixels: Tensor
    """[P, 3*p*p] uint8 in host memory, item after item; for a part only those of its rows."""
    grid_thw: tuple[Grid, ...]
    """Grid of each item; for a part that of the whole item."""


@torch.no_grad()
def encode(encoder: Encode, chunk: Chunk, device: torch.device) -> Tensor:
    """The features [V, D] of a chunk; no activation outlives the call."""
    return encoder(chunk.pixels.to(device, non_blocking=True), chunk.grid_thw)


def recompute_and_backward(encoder: Encode, chunk: Chunk, gradient: Tensor) -> None:
    """Encode a chunk again and add to the gradients of the encoder's parameters.

    Args:
        gradient: [V, D] gradient of the loss by the features, on the device.
    """
    with torch.enable_grad():
        features = encoder(chunk.pixels.to(gradient.device, non_blocking=True), chunk.grid_thw)
        features.backward(gradient.to(features.dtype))


class EncodeInSteps:
    """`encode`, one layer per step; between steps only the last layer's output is kept."""

    def __init__(self, encoder: LayeredEncoder, chunk: Chunk, device: torch.device) -> None:
        self._hidden = chunk.pixels.to(device, non_blocking=True)
        self._layers = list(encoder.layers(self._hidden, chunk.grid_thw))

    @torch.no_grad()
    def advance(self, num_steps: int) -> Tensor | None:
        """Run the next steps; returns the features [V, D] after the last one."""
        for _ in range(num_steps):
            self._hidden = self._layers.pop(0)(self._hidden)
        return None if self._layers else self._hidden


class BackwardInSteps:
    """`recompute_and_backward`, in as many steps as there are layers.

    With `keeps_activations` a step recomputes three layers as long as there are any, and then goes backward
    through one and a half, since backward of a layer takes twice its forward. Otherwise only the inputs of
    layers are kept from the forward pass, and each layer runs once more right before its backward: one layer
    at a time has activations, and a step takes four thirds of the time. Both give the same numbers.
    """

    def __init__(
        self, encoder: LayeredEncoder, chunk: Chunk, gradient: Tensor, *, keeps_activations: bool
    ) -> None:
        self._hidden: Tensor | None = chunk.pixels.to(gradient.device, non_blocking=True)
        self._layers = list(encoder.layers(self._hidden, chunk.grid_thw))
        self._gradient: Tensor | None = gradient
        self._keeps = keeps_activations
        self._graphs: list[tuple[Tensor, Tensor]] = []
        self._passed: list[tuple[Layer, Tensor]] = []
        self._due = 0

    def advance(self, num_steps: int) -> bool:
        """Run the next steps; returns whether the pass is complete and parameters have their gradients."""
        back_cost = BACKWARD_COST if self._keeps else RECOMPUTE_AND_BACKWARD_COST
        self._due += (1 + back_cost) * num_steps
        while self._layers and self._due >= 1:
            self._due -= 1
            self._go_forward()
        while not self._layers and (self._graphs or self._passed) and self._due >= back_cost:
            self._due -= back_cost
            self._go_back(*(self._graphs.pop() if self._graphs else self._recompute()))
        return not self._layers and not self._graphs and not self._passed

    def _go_forward(self) -> None:
        """Run the next layer, with its own graph or for its output alone."""
        assert self._hidden is not None, "there are layers to run"
        layer, start = self._layers.pop(0), self._hidden
        if self._keeps:
            # Pixels need no gradient.
            self._graphs.append(_with_graph(layer, start, is_first=not self._graphs))
            end = self._graphs[-1][1]
        else:
            self._passed.append((layer, start))
            with torch.no_grad():
                end = layer(start)
        self._hidden = end if self._layers else None

    def _recompute(self) -> tuple[Tensor, Tensor]:
        """Input and output of the last layer that has not gone backward, computed again."""
        layer, start = self._passed.pop()
        return _with_graph(layer, start, is_first=not self._passed)

    def _go_back(self, start: Tensor, end: Tensor) -> None:
        """Go backward through the graph of one layer, which is freed."""
        assert self._gradient is not None, "only the pixels' gradient is None"
        end.backward(self._gradient.to(end.dtype))
        self._gradient = start.grad


@torch.enable_grad()
def _with_graph(layer: Layer, hidden: Tensor, *, is_first: bool) -> tuple[Tensor, Tensor]:
    """A layer's input and output, with a graph of its own, so that backward can stop between layers."""
    start = hidden.detach().requires_grad_(not is_first)
    return start, layer(start)
