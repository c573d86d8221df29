"""What each part of the decoder stack costs a pipeline rank, for the choice of a layout; torch-free.

The vision tower and the projector are not in it: the pipeline is laid out for text, and what vision adds is
spread over all ranks by the decoupled encoder instead (K2.5 report, section 4.5.1).
"""

from collections.abc import Iterable

from k25_train.config.basics import DType, data_parallel_size
from k25_train.config.cluster import ClusterConfig
from k25_train.config.model import ModelConfig
from k25_train.config.optimizer import OptimConfig, OptimName
from k25_train.config.training import TrainConfig
from k25_train.parameters.megatron import (
    TrainedParameter,
    embedding_parameter,
    head_parameters,
    layer_parameters,
)
from k25_train.parameters.update_rules import rule_of
from k25_train.plan.flops import head_forward_flops, layer_forward_flops
from parallel.config import ParallelismConfig
from parallel.pipeline.balance import StackCost

WEIGHT_BYTES = {DType.float32: 4, DType.bfloat16: 2}
"""Bytes of a weight that forward and backward use."""
GRADIENT_BYTES = 4
"""Gradients are summed in float32, whatever the weights are."""
MASTER_BYTES = {DType.float32: 0, DType.bfloat16: 4}
"""Bytes of a weight's float32 master, cut over data-parallel ranks (ZeRO-1) as all optimizer state is; a
float32 weight is its own."""
MOMENT_BYTES = {OptimName.adamw: 8, OptimName.muonclip: 4}
"""Bytes of what the update of a weight remembers: AdamW two float32 moments, Muon a float32 momentum."""


def state_bytes(update: OptimName, dtype: DType) -> int:
    """Bytes of optimizer state of one weight, over all data-parallel ranks."""
    return MASTER_BYTES[dtype] + MOMENT_BYTES[update]


def stack_cost(
    model: ModelConfig,
    train: TrainConfig,
    optim: OptimConfig,
    cluster: ClusterConfig,
    parallelism: ParallelismConfig,
) -> StackCost:
    """Cost of the decoder stack: FLOPs of one sequence's forward pass, bytes of weights, gradients and
    optimizer state on one rank.

    A sequence counts as one document, in which attention costs most. A backward pass costs every part twice
    its forward pass, so it changes no balance. Where optimizer state is kept (`optim.offload`) is not
    considered.
    """
    dp = data_parallel_size(cluster.world_size, parallelism.pp)
    expert_dp = max(1, dp // parallelism.ep)

    def bytes_of(parameters: Iterable[TrainedParameter]) -> int:
        total = 0
        for parameter in parameters:
            num_weights, num_replicas = parameter.size, dp
            if parameter.is_expert:
                num_weights, num_replicas = parameter.size // parallelism.ep, expert_dp
            state = state_bytes(rule_of(*parameter, optim, model).update, train.dtype)
            total += num_weights * (WEIGHT_BYTES[train.dtype] + GRADIENT_BYTES)
            total += num_weights * state // num_replicas
        return total

    def bytes_of_layer(layer: int) -> int:
        return bytes_of(layer_parameters(model, layer))

    num_dense, num_moe = model.num_dense_layers, model.num_moe_layers
    layers = range(model.num_layers)
    return StackCost(
        layer_flops=tuple(layer_forward_flops(model, layer, [train.seq_len]) for layer in layers),
        # Layers of a kind are alike.
        layer_bytes=(bytes_of_layer(0),) * num_dense + (bytes_of_layer(model.num_layers - 1),) * num_moe,
        embedding_bytes=bytes_of([embedding_parameter(model)]),
        head_flops=head_forward_flops(model, train.seq_len),
        head_bytes=bytes_of(head_parameters(model)),
    )
