"""One step of all optimizers, which every rank skips if the gradient is not finite."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from torch import nn

from parallel.megatron.part_norms import Limits, PartNorms
from parallel.megatron.sharded_optimizer import ShardedOptimizer

_MOST_NAMED = 32
"""Parameters that a rank names: thousands of ranks may have thousands each."""


class SkipNonFiniteOptimizer(ChainedOptimizer):
    """Leaves weights and optimizer state unchanged if the global gradient norm is NaN or infinite.

    The norm is the same on every rank, so all of them skip the step, or none.
    """

    def __init__(
        self, optimizers: Sequence[ShardedOptimizer], names: Mapping[nn.Parameter, str], limits: Limits
    ) -> None:
        """
        Args:
            optimizers: of this rank.
            names: of the parameters in the whole model.
            limits: of the gradient norm of each trained part, in the same order on every rank.
        """
        super().__init__(list(optimizers))
        for optimizer in optimizers:
            # Buckets of several optimizers may be gathered together: after the step of one, the others' are
            # stale. `step_with_ready_grads` gathers them when all have stepped.
            optimizer._defer_param_sync = True
        self._names = names
        self._norms = PartNorms(optimizers, names, limits)
        self.part_norms: Mapping[str, float] = dict.fromkeys(limits, 0.0)
        """Trained part -> norm of its gradient in the last step, before anything was clipped."""
        self._is_finite = True
        self.before_update: Callable[[], None] = _nothing
        """Called before masters, moments and weights change: who still reads them has the update wait."""
        self.not_finite: list[str] = []
        """Names of parameters whose gradient was not finite in the last step, some of each rank."""

    @torch.no_grad()
    def step(self) -> tuple[bool, float, int | None]:
        """Whether weights changed, the global norm of the gradient before anything was clipped, to float32's
        last digit in any layout, and None. Called by every rank."""
        updated, _, num_zeros = super().step()
        return updated, _joined(self.part_norms), num_zeros

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """The global norm of the gradient when parts are limited to norms of their own, which is then clipped
        as a whole."""
        self.part_norms = self._norms.of_gradients(self.get_grad_stats_parallel_group())
        self._is_finite = math.isfinite(_joined(self.part_norms))
        # Clipping by such a norm spreads it to all gradients: its origin can be found only now.
        self.not_finite = [] if self._is_finite else self._find_not_finite()
        return _joined(self._norms.limit(self.part_norms))

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


def _joined(norms: Mapping[str, float]) -> float:
    """The norm of all parts together."""
    return math.sqrt(sum(norm**2 for norm in norms.values()))


def _nothing() -> None:
    """What most updates wait for."""
