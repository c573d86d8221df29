"""ZeRO-1 whose float32 masters and moments rest in host memory, and are updated on the device.

megatron-core offloads too (`optimizer/cpu_offloading/hybrid_optimizer.py`), but steps on the host, with one
thread per rank as ranks are started, and copies through memory that is not page-locked. This one takes over a
built `ShardedOptimizer` and changes nothing else of it: checkpoints see other tensors of the same shards.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from parallel.host.memory import HostMemoryError, map_pages
from parallel.host.state_stream import StateStream
from parallel.megatron.sharded_optimizer import ParameterShard, ShardedOptimizer
from parallel.megatron.state_store import HostShard, HostStore, ParamGroups, StateStore, Transform
from parallel.units import GIB

BuildOptimizer = Callable[[ParamGroups, StateStore], torch.optim.Optimizer]
"""From parameter groups of masters in host memory, and their store, to the optimizer that steps them."""


class HostOptimizer(ShardedOptimizer):
    """A `ShardedOptimizer` whose state is one page-locked region of host memory.

    Reduction, norm and clipping stay on the device, and gradients never leave it. In a step masters and
    moments pass through the device, which writes the weights: 8 bytes of each element of a shard cross the
    bus in each direction with Muon, 12 with AdamW. The host holds the same 8 or 12 bytes, and nothing else.
    """

    def __init__(self, resident: ShardedOptimizer, build: BuildOptimizer, stream: StateStream) -> None:
        """Take over `resident`, which has not made a step yet and must not be used afterwards.

        Raises `HostMemoryError` if the host does not have the memory, or cannot page-lock it.
        """
        self.__dict__.update(resident.__dict__)
        self.store = HostStore(stream)
        own = resident.shards()
        # 1. One region for all of the state.
        self.arena = self._lock(4 * sum(self._num_elements(shard) for shard in own.values()))
        free = self.arena.view(torch.float32)
        state: dict[Tensor, dict[str, Tensor]] = {}

        def take(shard: ParameterShard) -> Tensor:
            nonlocal free
            size, tensors = shard.end - shard.start, []
            for _ in range(1 + len(self.optimizer_state_keys)):
                tensors.append(free[:size])
                free = free[size:]
            master, *moments = tensors
            master.copy_(shard.weights)
            state[master] = dict(zip(self.optimizer_state_keys, moments, strict=True))
            self.store.add(HostShard(master, shard.gradient, shard.weights, shard.start))
            return master

        groups = resident.optimizer.param_groups
        for index, group in enumerate(groups):
            # 2. Masters, in megatron-core's order: float32 parameters of a group first, then the others.
            float32, float16 = self.model_fp32_groups[index], self.model_float16_groups[index]
            masters = [take(own[parameter]) for parameter in [*float32, *float16]]
            # 3. megatron-core finds masters in four places; all of them get those in the host.
            for parameter, master in zip(float16, masters[len(float32) :], strict=True):
                parameter.main_param = master
            self.shard_fp32_groups[index] = masters[: len(float32)]
            self.shard_fp32_from_float16_groups[index] = masters[len(float32) :]
            group["params"] = masters
        # 4. An inner optimizer with all of its state: what it made itself would lie elsewhere.
        self.optimizer = build(groups, self.store)
        for master, moments in state.items():
            self.optimizer.state[master] = {"step": torch.zeros((), dtype=torch.float32), **moments}
        self._gradients = [_holder(shard.gradient) for shard in self.store.shards()]

    def _num_elements(self, shard: ParameterShard) -> int:
        return (shard.end - shard.start) * (1 + len(self.optimizer_state_keys))

    def _lock(self, num_bytes: int) -> Tensor:
        try:
            region = map_pages(num_bytes)
            if num_bytes:
                self.store.stream.copier.pin(region)
        except HostMemoryError as error:
            raise HostMemoryError(
                f"optim.offload: the host has no {num_bytes / GIB:.4g} GiB of page-locked memory for every "
                f"rank on it ({error}): use more nodes, raise the limit of locked memory (ulimit -l), or "
                "keep the state on the device with optim.offload=none"
            ) from error
        return region

    def get_parameters(self) -> list[Tensor]:
        """Tensors whose gradients norm and clipping read: those on the device."""
        return self._gradients

    def transform_updates(self, transforms: Mapping[nn.Parameter, Transform]) -> None:
        """Let updated masters of these parameters be changed in each step, while they are on the device."""
        own = self.shards()
        for parameter, transform in transforms.items():
            self.store.shard(own[parameter].master).transforms.append(transform)

    def shards(self) -> dict[nn.Parameter, ParameterShard]:
        """This rank's shards, with their masters as the last step left them."""
        self.store.stream.settle()
        return super().shards()

    def _copy_model_grads_to_main_grads(self) -> None:
        """Do nothing: gradients are used where the reduction left them."""

    def _copy_main_params_to_model_params(self) -> None:
        """Do nothing: weights are written while masters are on the device."""


def _holder(gradient: Tensor) -> Tensor:
    holder = gradient.detach()
    holder.grad = gradient.detach()
    return holder
