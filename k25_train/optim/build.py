"""Build the optimizer: megatron-core's ZeRO-1 distributed optimizer around AdamW, on device or host."""

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from k25_train.config.optimizer import OptimConfig, OptimizerOffload
from k25_train.optim.cpu_adam import CpuAdamW
from parallel.megatron.host_optimizer import step_on_host


def build_optimizer(
    optim: OptimConfig, chunks: list[DistributedDataParallel], params_dtype: torch.dtype
) -> MegatronOptimizer:
    """AdamW with float32 masters and moments sharded over data-parallel ranks (ZeRO-1).

    One-dimensional parameters (norms, biases) get no weight decay. The learning rate is set before each step
    by `set_learning_rate`. With `optim.offload=cpu` masters and moments are in host memory and stepped there.

    Raises `ConfigError` if that is asked for and DeepSpeed's kernel is not to be had.
    """
    config = OptimizerConfig(
        optimizer="adam",
        # By these megatron-core recognises the parameter groups of a checkpoint: with the configured rates a
        # run could not go on with others.
        lr=1.0,
        min_lr=0.0,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.grad_clip,
        use_distributed_optimizer=True,
        overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
        bf16=params_dtype is torch.bfloat16,
        params_dtype=params_dtype,
    )
    optimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)
    for group in optimizer.param_groups:
        # torch's AdamW, which stands in for Apex's and Transformer Engine's fused ones, fuses on request.
        if "fused" in group:
            group["fused"] = True
    if optim.offload is OptimizerOffload.cpu:
        return step_on_host(optimizer, CpuAdamW)
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    """Use `rate` in the next step, for every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
