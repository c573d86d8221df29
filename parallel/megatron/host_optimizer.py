"""ZeRO-1 whose float32 masters, moments and update live in host memory.

megatron-core offloads too (`optimizer/cpu_offloading/hybrid_optimizer.py`), but only from CUDA: it picks
parameters by `is_cuda`, and on the CPU it stops at a KeyError, so nothing of it could be tested here. It also
copies the moments' references again in every step, and its masters after loading are other tensors than
before. This one takes over a built `ShardedOptimizer` and changes nothing else of it, checkpoints included.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.megatron.sharded_optimizer import ParameterShard, ParamGroups, ShardedOptimizer

BuildOptimizer = Callable[[ParamGroups], torch.optim.Optimizer]
"""From parameter groups of host tensors to the optimizer that steps them."""


@dataclass(frozen=True, slots=True)
class HostShard:
    """This rank's part [N] of one parameter, on both sides of the bus."""

    master: Tensor
    """float32 in host memory: what the optimizer updates."""
    host_gradient: Tensor
    """float32 in host memory: copy of the reduced and clipped gradient."""
    gradient: Tensor
    """float32 on the device, in the gradient buffer: reduced, and clipped there."""
    weights: Tensor
    """In the run's dtype on the device, in the parameter buffer: what is gathered after the update."""


class HostOptimizer(ShardedOptimizer):
    """A `ShardedOptimizer` whose inner optimizer steps tensors in host memory.

    Reduction, norm and clipping stay on the device. Then gradients are copied to the host and applied to the
    masters there, and updated masters are copied back and cast on the device. The host holds 16 bytes per
    element of a shard: master, gradient and two moments. The 8 bytes that cross the bus are pinned; moments
    never cross it.
    """

    def __init__(self, resident: ShardedOptimizer, build: BuildOptimizer) -> None:
        """Take over `resident`, which has not made a step yet and must not be used afterwards."""
        self.__dict__.update(resident.__dict__)
        self.host_shards: list[HostShard] = []
        own = resident.shards()
        groups = resident.optimizer.param_groups
        # 1. Masters, in megatron-core's order: float32 parameters of a group first, then the others.
        for index, group in enumerate(groups):
            float32, float16 = self.model_fp32_groups[index], self.model_float16_groups[index]
            shards = [_to_host(own[parameter]) for parameter in [*float32, *float16]]
            # 2. megatron-core finds masters in four places; all of them get those on the host.
            masters = [shard.master for shard in shards]
            for parameter, master in zip(float16, masters[len(float32) :], strict=True):
                parameter.main_param = master
            self.shard_fp32_groups[index] = masters[: len(float32)]
            self.shard_fp32_from_float16_groups[index] = masters[len(float32) :]
            group["params"] = masters
            self.host_shards += shards
        # 3. An inner optimizer for the host.
        self.optimizer = build(groups)
        self._gradients = [_holder(shard.gradient) for shard in self.host_shards]

    def get_parameters(self) -> list[Tensor]:
        """Tensors whose gradients norm and clipping read: those on the device."""
        return self._gradients

    def _copy_model_grads_to_main_grads(self) -> None:
        """Do nothing: gradients are used where the reduction left them."""

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Copy clipped gradients to the host, step there, and copy updated weights back."""
        for shard in self.host_shards:
            shard.host_gradient.copy_(shard.gradient, non_blocking=True)
        # Copies to pinned memory are asynchronous, and so are those of the previous step, which read the
        # masters that are about to change.
        torch.cuda.synchronize()
        for shard in self.host_shards:
            shard.master.grad = shard.host_gradient
        return super().step_with_ready_grads()

    def _copy_main_params_to_model_params(self) -> None:
        for shard in self.host_shards:
            # Cast on the device: a cast on the host would go through memory that is not pinned.
            shard.weights.copy_(shard.master.to(shard.weights.device, non_blocking=True))


def _to_host(shard: ParameterShard) -> HostShard:
    weights = shard.weights
    return HostShard(
        master=_pinned_for(weights).copy_(weights),
        host_gradient=_pinned_for(weights),
        gradient=shard.gradient,
        weights=weights,
    )


def _holder(gradient: Tensor) -> Tensor:
    holder = gradient.detach()
    holder.grad = gradient.detach()
    return holder


def _pinned_for(shard: Tensor) -> Tensor:
    """Host memory for a float32 copy of `shard`; page-locked if the shard is on a GPU.

    torch's own pinned allocator rounds sizes up to powers of two: up to twice the memory.
    """
    host = torch.zeros(shard.numel(), dtype=torch.float32)
    if shard.is_cuda and host.numel():
        status = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0)
        torch.cuda.check_error(status)
    return host
