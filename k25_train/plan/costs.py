"""What each part of the decoder stack costs a pipeline rank, for the choice of a layout; torch-free.

The vision tower and the projector are not in it: the pipeline is laid out for text, and what vision adds is
spread over all ranks by the decoupled encoder instead (K2.5 report, section 4.5.1).
"""

from k25_train.config.basics import DType
from k25_train.config.schema import ClusterConfig, ModelConfig, TrainConfig
from k25_train.metrics.flops import head_forward_flops, layer_forward_flops
from k25_train.plan.parameters import EXPERTS, layer_tensors
from parallel.config import ParallelismConfig
from parallel.layout_plan import StackCost

WEIGHT_BYTES = {DType.float32: 4, DType.bfloat16: 2}
"""Bytes of a weight that forward and backward use."""
GRADIENT_BYTES = 4
"""Gradients are summed in float32, whatever the weights are."""
STATE_BYTES = {DType.float32: 8, DType.bfloat16: 12}
"""Bytes of AdamW's state of a weight, cut over data-parallel ranks (ZeRO-1): two float32 moments and, beside
bfloat16 weights, a float32 master."""


def stack_cost(
    model: ModelConfig, train: TrainConfig, cluster: ClusterConfig, parallelism: ParallelismConfig
) -> StackCost:
    """Cost of the decoder stack: FLOPs of one sequence's forward pass, bytes of weights, gradients and
    optimizer state on one rank.

    A sequence counts as one document, in which attention costs most. A backward pass costs every part twice
    its forward pass, so it changes no balance. Where optimizer state is kept (`optim.offload`) is not
    considered.
    """
    dp = max(1, cluster.world_size // parallelism.pp)
    expert_dp = max(1, dp // parallelism.ep)

    def bytes_of(num_weights: int, num_replicas: int) -> int:
        whole = WEIGHT_BYTES[train.dtype] + GRADIENT_BYTES
        return num_weights * whole + num_weights * STATE_BYTES[train.dtype] // num_replicas

    def bytes_of_layer(layer: int) -> int:
        sizes = {True: 0, False: 0}
        for tensor in layer_tensors(model, layer):
            if not tensor.is_buffer:
                sizes[tensor.module == EXPERTS] += tensor.size
        return bytes_of(sizes[False], dp) + bytes_of(sizes[True] // parallelism.ep, expert_dp)

    num_dense, num_moe = model.num_dense_layers, model.num_layers - model.num_dense_layers
    table = model.vocab_size * model.hidden_size
    layers = range(model.num_layers)
    return StackCost(
        layer_flops=tuple(layer_forward_flops(model, layer, [train.seq_len]) for layer in layers),
        # Layers of a kind are alike, and one with experts has over a thousand tensors to count.
        layer_bytes=(bytes_of_layer(0),) * num_dense + (bytes_of_layer(model.num_layers - 1),) * num_moe,
        embedding_bytes=bytes_of(table, dp),
        head_flops=head_forward_flops(model, train.seq_len),
        head_bytes=bytes_of(table + model.hidden_size, dp),
    )
