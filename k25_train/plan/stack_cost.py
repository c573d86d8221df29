"""What each part of the decoder stack costs a pipeline rank, for the choice of a layout; torch-free.

The vision tower and the projector are not in it: the pipeline is laid out for text, and what vision adds is
spread over all ranks by the decoupled encoder instead (K2.5 report, section 4.5.1).
"""

from collections.abc import Iterable

from k25_train.config.basics import ranks_of_stage
from k25_train.config.cluster import ClusterConfig
from k25_train.config.model import ModelConfig
from k25_train.config.optimizer import OptimConfig
from k25_train.config.training import TrainConfig
from k25_train.parameters.megatron import (
    TrainedParameter,
    embedding_parameter,
    head_parameters,
    layer_parameters,
)
from k25_train.parameters.update_rules import rule_of
from k25_train.plan.flops import head_forward_flops, layer_forward_flops
from k25_train.plan.weight_bytes import GRADIENT_BYTES, WEIGHT_BYTES, state_bytes
from parallel.config import ParallelismConfig
from parallel.pipeline.balance import StackCost


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
    of_stage = ranks_of_stage(cluster.world_size, parallelism.pp)
    expert_dp = max(1, of_stage // parallelism.ep)

    def bytes_of(parameters: Iterable[TrainedParameter]) -> int:
        total = 0
        for parameter in parameters:
            num_weights, num_replicas = parameter.size, of_stage
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
