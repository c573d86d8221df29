"""What a step costs, as far as changes that save memory need to be told apart; torch-free.

An estimate in a few sums, for where no time is planned (`k25_train.plan.time`). Communication that
computation hides is not in it.
"""

from k25_train.config.cluster import Device
from k25_train.config.optimizer import OptimizerOffload
from k25_train.plan.flops import head_forward_flops, layer_forward_flops
from k25_train.plan.memory.activations import stage_tensors
from k25_train.plan.memory.expert_exchange import row_bytes
from k25_train.plan.optimizer import stage_state
from k25_train.plan.pipeline import PipelinePlan, StagePlan
from k25_train.units import GB
from parallel.activations.policy import Policy
from parallel.pipeline.schedule import BACKWARD_COST

MODEL_SHARE = 0.4
"""Share of the data sheet's rate at which model FLOPs are computed. Source: our choice."""
COPIES_TAKE = 0.05
"""Share of a copy's time that computation loses to it, even where it is hidden. Source: offloading cost 3 to
5% of a step where copies took most of it (Megatron-LM pull request 7474)."""
ROUND_TRIPS = 2
"""Exchanges of a MoE layer in each direction of a pass: to the experts and back."""
TIMES_MOVED = 3
"""How often what is made again crosses the device's memory: its inputs are read, it is written and read."""


def gpu_seconds(pipeline: PipelinePlan) -> float:
    """Seconds of a step over all ranks, of which more nodes take as many at best."""
    parallelism, number = pipeline.config.parallelism, pipeline.num_micro_batches
    pass_s = max(_micro_batch_s(stage) for stage in pipeline.stages)
    idle_passes = (parallelism.pp - 1) / parallelism.vpp
    step_s = (number + idle_passes) * pass_s + max(map(_optimizer_s, pipeline.stages))
    return step_s * pipeline.config.world_size


def _micro_batch_s(stage: StagePlan) -> float:
    """A micro-batch through all chunks of a stage, forward and backward."""
    config, model, sizes = stage.config, stage.config.model, stage.balanced_sizes
    rates = config.cluster.rates
    layers = [layer for chunk in stage.chunks for layer in chunk.layers]
    # 1. Products.
    flops = sum(layer_forward_flops(model, layer, sizes.documents) for layer in layers)
    flops += head_forward_flops(model, sizes.tokens) * stage.chunks[-1].is_last
    share = MODEL_SHARE if config.cluster.device is Device.cuda else 1.0
    found = (1 + BACKWARD_COST) * flops / (1e12 * rates.bf16_tflops * share)
    # 2. What is made again, and what is copied to the host and back.
    tensors = [packed for chunk in stage_tensors(stage, sizes) for packed in chunk]
    made_again = sum(each.tensor.num_bytes for each in tensors if each.policy is Policy.recompute)
    if rates.memory_gb_per_s is not None:
        found += TIMES_MOVED * made_again / (GB * rates.memory_gb_per_s * rates.memory_efficiency)
    copy_s = 2 * sum(each.host_bytes for each in tensors) / (GB * config.cluster.host_copy_gb_per_s)
    found = max(found, copy_s / 2) + COPIES_TAKE * copy_s
    # 3. Tokens to experts and back, where no other pass runs meanwhile.
    if config.parallelism.overlap_expert_comm or config.parallelism.ep == 1:
        return found
    num_moe = sum(model.is_moe(layer) for layer in layers)
    sent = 2 * ROUND_TRIPS * num_moe * row_bytes(config, sizes)
    return found + sent / (GB * config.cluster.network_gb_per_s)


def _optimizer_s(stage: StagePlan) -> float:
    """Optimizer state that passes through the device."""
    if stage.config.optim.offload is not OptimizerOffload.cpu:
        return 0.0
    return 2 * stage_state(stage).host_bytes / (GB * stage.config.cluster.host_copy_gb_per_s)
