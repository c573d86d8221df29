"""ZeRO-1 for any update rule: a `DistributedOptimizer` over the parameters that share one.

megatron-core's distributed optimizer owns whole gradient buffers, so parameters of two rules need two sets
of buffers. It can build them: parameters that carry its layer-wise optimizer's mark get buffers of their own.
Here the mark means "another rule", and goes when the buffers are made. The layer-wise optimizer itself
is not used: it keeps whole matrices in shards of equal size, most of which is padding where ranks are many.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

_MARK = "is_managed_by_layer_wise_optimizer"

ParamGroups = list[dict[str, Any]]
"""Parameters with what they have in common: `params`, `lr_mult`, `wd_mult`, `weight_decay`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerPartition:
    """Parameters that one update rule is for, of one data-parallel group: dense ones or experts."""

    groups: ParamGroups
    """The same on every rank but for the parameters themselves; a rank may have none."""
    is_expert: bool
    build: Callable[[ParamGroups], torch.optim.Optimizer]
    """From groups of flat float32 shards to the optimizer that updates them."""
    build_on_host: Callable[[ParamGroups], torch.optim.Optimizer]
    """The same for shards in host memory."""
    state_keys: tuple[str, ...]
    """Names of the state tensors that the optimizer keeps for a shard, in the shard's shape."""


class ShardedOptimizer(DistributedOptimizer):
    """megatron-core's distributed optimizer with state tensors of any name."""

    def __init__(self, state_keys: tuple[str, ...], *args: Any, **kwargs: Any) -> None:
        self._state_keys = state_keys
        super().__init__(*args, **kwargs)

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        """Names of the state tensors of a shard; checkpoints hold one each."""
        return self._state_keys

    def master_of(self, parameter: nn.Parameter) -> tuple[Tensor, int] | None:
        """This rank's float32 shard of a parameter, flat, and where it starts in the flat parameter."""
        if parameter not in self.model_param_gbuf_map:
            return None
        group, place = self.model_param_group_index_map[parameter]
        start = self._get_model_param_range_map(parameter)["param"].start
        return self.optimizer.param_groups[group]["params"][place], start


@contextmanager
def buffers_apart(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within: data-parallel buffers that are made hold either these parameters or others, never both."""
    marked = list(parameters)
    for parameter in marked:
        setattr(parameter, _MARK, True)
    try:
        yield
    finally:
        for parameter in marked:
            delattr(parameter, _MARK)


def shard(
    part: OptimizerPartition, config: OptimizerConfig, chunks: Sequence[DistributedDataParallel]
) -> ShardedOptimizer:
    """The optimizer of a part whose buffers were made apart from those of other parts.

    Its state is sharded over the ranks that the buffers' gradients are reduced over.
    """
    places = ProcessGroupCollection.setup_process_groups_for_optimizer(None, list(chunks), False)
    group = chunks[0].intra_expt_dp_group if part.is_expert else chunks[0].intra_dp_cp_group
    model_parallel = places["expt_tp_pp_with_egtp_remat_group" if part.is_expert else "mp_group"]
    own = {parameter for group in part.groups for parameter in group["params"]}
    buffers = {
        index: [
            buffer
            for buffer in (chunk.expert_parallel_buffers if part.is_expert else chunk.buffers)
            if not own.isdisjoint(buffer.params)
        ]
        for index, chunk in enumerate(chunks)
    }
    optimizer = ShardedOptimizer(
        part.state_keys,
        part.build(part.groups),
        config,
        None,
        lambda *_: None,
        model_chunks=list(chunks),
        per_model_buffers=buffers,
        data_parallel_group=group,
        data_parallel_group_gloo=None,
        data_parallel_group_idx=dist.get_rank(model_parallel),
        distributed_optimizer_instance_id=0,
    )
    optimizer.grad_stats_parallel_group = places["intra_dist_opt_group"]
    return optimizer
