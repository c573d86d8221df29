"""One step of all optimizers, which every rank skips if the gradient is not finite."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from torch import nn

from parallel.megatron.sharded_optimizer import ShardedOptimizer
from parallel.norms import sum_of_squares

_MOST_NAMED = 32
"""Parameters that a rank names: thousands of ranks may have thousands each."""


class SkipNonFiniteOptimizer(ChainedOptimizer):
    """Leaves weights and optimizer state unchanged if the global gradient norm is NaN or infinite.

    The norm is the same on every rank, so all of them skip the step, or none.
    """

    def __init__(self, optimizers: Sequence[ShardedOptimizer], names: Mapping[nn.Parameter, str]) -> None:
        """`names` are the names of the parameters in the whole model."""
        super().__init__(list(optimizers))
        for optimizer in optimizers:
            # Buckets of several optimizers may be gathered together: after the step of one, the others' are
            # stale. `step_with_ready_grads` gathers them when all have stepped.
            optimizer._defer_param_sync = True
        self._names = names
        self._is_finite = True
        self.before_update: Callable[[], None] = _nothing
        """Called before masters, moments and weights change: who still reads them has the update wait."""
        self.not_finite: list[str] = []
        """Names of parameters whose gradient was not finite in the last step, some of each rank."""

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """The global norm of the gradient, before it is clipped, to float32's last digit in any layout."""
        gradients = [each for part in self.chained_optimizers for each in part.get_grads_for_grad_norm()]
        squares = torch.zeros(1, dtype=torch.float64, device="cuda")
        if gradients:
            squares += sum_of_squares(gradients)
        dist.all_reduce(squares, group=self.get_grad_stats_parallel_group())
        norm = math.sqrt(squares.item())
        self._is_finite = math.isfinite(norm)
        # Clipping by such a norm spreads it to all gradients: its origin can be found only now.
        self.not_finite = [] if self._is_finite else self._find_not_finite()
        return norm

    def step_with_ready_grads(self) -> bool:
        """Update and gather parameters, or return False if the gradient is not finite."""
        if not self._is_finite:
            return False
        self.before_update()
        updated = super().step_with_ready_grads()
        for chunk in self.model_chunks:
            if not chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync()
        return updated

    def _find_not_finite(self) -> list[str]:
        """Names of parameters with such a gradient, some of each rank. Called by every rank."""
        shards = [shard for part in self.chained_optimizers for shard in part.shards().values()]
        found = [self._names[each.parameter] for each in shards if not each.gradient.isfinite().all()]
        by_rank: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(by_rank, sorted(found)[:_MOST_NAMED])
        return sorted({name for names in by_rank for name in names})


def _nothing() -> None:
    """What most updates wait for."""
