"""Where an optimizer's masters and moments rest, and how its arithmetic on the device gets at them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from parallel.host.state_stream import Lane, ResidentLane, StateStream

ParamGroups = list[dict[str, Any]]
"""Parameters with what they have in common: `params`, `lr_mult`, `wd_mult`, `weight_decay`."""
Transform = Callable[[Tensor, int], None]
"""Changes updated masters [n] in place on the device; the number is the index of their first element in the
parameter."""


class StateStore(Protocol):
    """What an inner optimizer needs to step shards [N], which it knows by their masters."""

    def lane(self, num_elements: int) -> Lane:
        """A lane for masters and moments, of so many elements per load."""

    def gradient(self, master: Tensor) -> Tensor:
        """float32 [N] on the device: the reduced and clipped gradient of a shard."""

    def finish(self, master: Tensor, start: int, values: Tensor) -> None:
        """Take updated masters [n] on the device, which are those of the shard from element `start` on."""


class ResidentStore:
    """State on the device, where megatron-core copies masters to the model after the step."""

    def lane(self, num_elements: int) -> ResidentLane:
        """Nothing moves."""
        return ResidentLane()

    def gradient(self, master: Tensor) -> Tensor:
        """The one that megatron-core has set."""
        assert master.grad is not None
        return master.grad

    def finish(self, master: Tensor, start: int, values: Tensor) -> None:
        """Nothing: they are the master itself."""


@dataclass(frozen=True, slots=True)
class HostShard:
    """This rank's part [N] of one parameter: a master in the host, and what belongs to it on the device."""

    master: Tensor
    """float32 in page-locked host memory."""
    gradient: Tensor
    """float32 on the device, in the gradient buffer: reduced, and clipped there."""
    weights: Tensor
    """In the run's dtype on the device, in the parameter buffer: what is gathered after the update."""
    start: int
    """Index of the first element in the parameter."""
    transforms: list[Transform] = field(default_factory=list)
    """What is done to an updated master before it is copied to the model."""


class HostStore:
    """State in host memory, which streams through the device; weights are written there on the way."""

    def __init__(self, stream: StateStream) -> None:
        self.stream = stream
        self._shards: dict[Tensor, HostShard] = {}

    def add(self, shard: HostShard) -> None:
        """Hold a shard."""
        self._shards[shard.master] = shard

    def shards(self) -> list[HostShard]:
        """All shards."""
        return list(self._shards.values())

    def shard(self, master: Tensor) -> HostShard:
        """The shard with this master."""
        return self._shards[master]

    def lane(self, num_elements: int) -> Lane:
        """Two buffers on the device, and copies ahead of and behind the arithmetic."""
        return self.stream.lane(num_elements)

    def gradient(self, master: Tensor) -> Tensor:
        """The shard's part of the gradient buffer."""
        return self._shards[master].gradient

    def finish(self, master: Tensor, start: int, values: Tensor) -> None:
        """Transform the values, and write the weights that they are the masters of."""
        shard = self._shards[master]
        for transform in shard.transforms:
            transform(values, shard.start + start)
        shard.weights[start : start + values.numel()].copy_(values)
