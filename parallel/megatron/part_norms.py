"""Gradient norms of parts of a model, exact in any layout, and limits of them.

A part is the first component of its parameters' names in the whole model. Sums are in float64, so that a norm
is the same to float32's last digit however shards cut the parameters.
"""

import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from parallel.megatron.sharded_optimizer import ParameterShard, ShardedOptimizer
from parallel.norms import sum_of_squares

Limits = Mapping[str, float | None]
"""Part -> its largest gradient norm; None for no limit."""
_EPSILON = 1e-6
"""What megatron-core adds to a norm that it divides by."""


class PartNorms:
    """The norms of the parts that a rank's optimizers update, over all ranks."""

    def __init__(
        self, optimizers: Iterable[ShardedOptimizer], names: Mapping[nn.Parameter, str], limits: Limits
    ) -> None:
        """`names` are those of parameters in the whole model; `limits` has every part that is trained, in the
        same order on every rank."""
        self._limits = limits
        self._shards: dict[str, list[ParameterShard]] = {part: [] for part in limits}
        for optimizer in optimizers:
            for parameter, shard in optimizer.shards().items():
                self._shards[names[parameter].split(".", 1)[0]].append(shard)

    @torch.no_grad()
    def of_gradients(self, group: dist.ProcessGroup) -> dict[str, float]:
        """Part -> norm of its gradient. Called by every rank, of which each pair shares no element."""
        squares = torch.zeros(len(self._shards), dtype=torch.float64, device="cuda")
        for number, own in enumerate(self._shards.values()):
            if own:
                squares[number] = sum_of_squares([each.gradient for each in own])
        dist.all_reduce(squares, group=group)
        return {part: math.sqrt(each) for part, each in zip(self._shards, squares.tolist(), strict=True)}

    @torch.no_grad()
    def limit(self, norms: Mapping[str, float]) -> dict[str, float]:
        """Scale the gradients of parts whose norm is above its limit; part -> norm after that.

        Norms that are not finite limit nothing: the step is skipped then.
        """
        after = dict(norms)
        for part, norm in norms.items():
            most = self._limits[part]
            if most is None or not math.isfinite(norm) or norm <= most:
                continue
            after[part] = norm * most / (norm + _EPSILON)
            if gradients := [each.gradient for each in self._shards[part]]:
                torch._foreach_mul_(gradients, most / (norm + _EPSILON))
        return after
