"""ZeRO-1 for any update rule: a `DistributedOptimizer` over the parameters that share one.

megatron-core's distributed optimizer owns whole gradient buffers, so parameters of two rules need two sets
of buffers. It can build them: parameters that carry its layer-wise optimizer's mark get separate buffers.
Here the mark means "another rule", and is removed when the buffers exist. The layer-wise optimizer itself
is not used: it keeps whole matrices in shards of equal size, most of which is padding where ranks are many.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, Adam, OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer, Range
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from parallel.megatron.state_store import ParamGroups, StateStore, Transform

_MARK = "is_managed_by_layer_wise_optimizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerPartition:
    """Parameters of one update rule and one data-parallel group: dense ones or experts."""

    groups: ParamGroups
    """Parameter groups, the same on every rank but for `params`, which may be empty."""
    is_expert: bool
    """Whether the parameters are routed experts."""
    build: Callable[[ParamGroups], torch.optim.Optimizer]
    """Function from groups of flat float32 shards to the optimizer that updates them."""
    build_on_host: Callable[[ParamGroups, StateStore], torch.optim.Optimizer]
    """Function from groups of flat float32 shards in host memory, and what streams them through the device,
    to their optimizer."""
    state_keys: tuple[str, ...]
    """Names of the state tensors, in the shape of a shard, that the optimizer keeps per shard."""


@dataclass(frozen=True, slots=True)
class ParameterShard:
    """This rank's part [N] of a parameter, as a flat range of its elements: what its optimizer updates."""

    parameter: nn.Parameter
    """The whole parameter, as the model has it."""
    start: int
    """Index of the first element."""
    end: int
    """Index after the last element."""
    master: Tensor
    """float32 [N], what the inner optimizer steps; in host memory with `HostOptimizer`."""
    group: int
    """Index of its group in the inner optimizer's `param_groups`."""

    @property
    def weights(self) -> Tensor:
        """[N] in the run's dtype, in the parameter buffer: what is gathered after the update."""
        return self.parameter.detach().view(-1)[self.start : self.end]

    @property
    def gradient(self) -> Tensor:
        """float32 [N] in the gradient buffer: reduced after the backward pass, and clipped there."""
        return self.parameter.main_grad.view(-1)[self.start : self.end]  # type: ignore[attr-defined]


class ShardedOptimizer(DistributedOptimizer):
    """megatron-core's distributed optimizer with state tensors of any name."""

    def __init__(self, state_keys: tuple[str, ...], *args: Any, **kwargs: Any) -> None:
        self._state_keys = state_keys
        super().__init__(*args, **kwargs)

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        """Names of the state tensors of a shard; a checkpoint holds one of each."""
        return self._state_keys

    def shards(self) -> dict[nn.Parameter, ParameterShard]:
        """This rank's shard of each parameter of which it has one, in the order of the gradient buffers.

        Masters keep their identity through steps and checkpoints, so that a caller may keep the result.
        """
        return {parameter: self._shard_of(parameter) for parameter in self.model_param_gbuf_map}

    def moments(self, shard: ParameterShard) -> dict[str, Tensor]:
        """What the inner optimizer keeps about a shard: key -> float32 [N], where its master rests.

        Zeros are allocated if no step was made yet: what an optimizer starts from.
        """
        state = self.optimizer.state[shard.master]
        for key in self.optimizer_state_keys:
            if key not in state:
                state[key] = torch.zeros_like(shard.master)
        if "step" not in state and not self._counts_in_groups:
            on_device = self.optimizer.param_groups[shard.group].get("fused")
            device = shard.master.device if on_device else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        return {key: state[key] for key in self.optimizer_state_keys}

    @property
    def num_updates(self) -> int:
        """Steps that the inner optimizer has made; 0 if this rank has no shard."""
        for group in self.optimizer.param_groups:
            for master in group["params"]:
                state = self.optimizer.state.get(master, {})
                return int(state["step"] if "step" in state else group.get("step", 0))
        return 0

    def count_from(self, num_updates: int) -> None:
        """Go on as after so many steps; all moments must exist."""
        for group in self.optimizer.param_groups:
            # Where fused Adams count, ours of state in the host too. torch's does not look there.
            group["step"] = num_updates
            for master in group["params"]:
                if not self._counts_in_groups:
                    self.optimizer.state[master]["step"].fill_(num_updates)

    @property
    def _counts_in_groups(self) -> bool:
        """Whether it is a fused Adam of Transformer Engine or Apex, which has no count for each shard."""
        return not USING_PYTORCH_OPTIMIZER and isinstance(self.optimizer, Adam)

    def transform_updates(self, transforms: Mapping[nn.Parameter, Transform]) -> None:
        """Let updated masters of these parameters be changed in each step, before they reach the model."""
        own = self.shards()
        chosen = [(own[parameter], transform) for parameter, transform in transforms.items()]

        def run(*_: Any) -> None:
            for held, transform in chosen:
                transform(held.master, held.start)

        self.optimizer.register_step_post_hook(run)

    def _shard_of(self, parameter: nn.Parameter) -> ParameterShard:
        own = self._get_model_param_range_map(parameter)["param"]
        group, position = self.model_param_group_index_map[parameter]
        master = self.optimizer.param_groups[group]["params"][position]
        return ParameterShard(parameter, own.start, own.end, master, group)


def shard_ranges(buffer: Any, index: int, num_shards: int) -> Iterator[tuple[nn.Parameter, int, int]]:
    """(parameter, start, end) of each shard in a gradient buffer that rank `index` of `num_shards` has.

    As `DistributedOptimizer._build_model_gbuf_range` (megatron-core 0.19) has them, which lists the ranges of
    all ranks for each: 17 million of an encoder on 4,096 ranks.
    """
    assert buffer.num_optimizer_shards in (None, num_shards)
    for bucket in buffer.buckets:
        size, rest = divmod(bucket.grad_data.numel(), num_shards)
        assert rest == 0, "buckets are padded to a multiple of the shards"
        start = bucket.offset + index * size
        ranges = DistributedOptimizer._build_model_gbuf_param_range_map(
            buffer.param_index_map, Range(start, start + size), bucket.offset
        )
        for parameter, own in ranges.items():
            yield parameter, own["param"].start, own["param"].end


@contextmanager
def separate_buffers(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within: new data-parallel buffers hold either these parameters or others, never both."""
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
    """The optimizer of a partition whose buffers were made within `separate_buffers`.

    Its state is sharded over the ranks that reduce the buffers' gradients.
    """
    # 1. The groups that share the state, and the partition's buffers.
    process_groups = ProcessGroupCollection.setup_process_groups_for_optimizer(None, list(chunks), False)
    data_parallel = chunks[0].intra_expt_dp_group if part.is_expert else chunks[0].intra_dp_cp_group
    model_parallel = process_groups["expt_tp_pp_with_egtp_remat_group" if part.is_expert else "mp_group"]
    own = {parameter for group in part.groups for parameter in group["params"]}
    buffers = {
        index: [
            buffer
            for buffer in (chunk.expert_parallel_buffers if part.is_expert else chunk.buffers)
            if not own.isdisjoint(buffer.params)
        ]
        for index, chunk in enumerate(chunks)
    }
    # 2. megatron-core cuts the buffers and replaces `params` of the groups by shards.
    optimizer = ShardedOptimizer(
        part.state_keys,
        part.build(part.groups),
        config,
        None,
        lambda *_: None,
        model_chunks=list(chunks),
        per_model_buffers=buffers,
        data_parallel_group=data_parallel,
        data_parallel_group_gloo=None,
        data_parallel_group_idx=dist.get_rank(model_parallel),
        distributed_optimizer_instance_id=0,
    )
    optimizer.grad_stats_parallel_group = process_groups["intra_dist_opt_group"]
    return optimizer
