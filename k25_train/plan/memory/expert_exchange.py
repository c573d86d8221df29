"""Tokens on their way to experts and back, as far as no backward pass saves them; torch-free."""

from k25_train.plan.pass_sizes import PassSizes
from k25_train.plan.pipeline import StagePlan
from k25_train.plan.weight_bytes import WEIGHT_BYTES
from parallel.dispatcher import Dispatcher

LIBRARY_BYTES = 1 << 30
"""Buffers that DeepEP, HybridEP and NCCL EP register for NVLink and the network. Source: not disclosed for
this size and not measured; our choice."""


def exchange_bytes(stage: StagePlan, sizes: PassSizes) -> int:
    """What the exchanges of a MoE layer take at most, of all passes that run at a time.

    On the way there: tokens sorted for sending, and as they arrive; sorted by expert they are what the layer
    saves. On the way back: outputs by expert, as they are sent, and as they arrive. Backward has gradients of
    the same. So up to two tensors of the rows that arrive are alive at a time, and one of those sent. The
    overlapped schedule has a forward and a backward pass in the same layer's exchanges. Dispatchers that send
    a token once per rank have no more rows, and buffers of their own.
    """
    config = stage.config
    if not any(config.model.is_moe(layer) for chunk in stage.chunks for layer in chunk.layers):
        return 0
    num_sent = (sizes.tokens - sizes.padding_tokens) * config.model.num_experts_per_token
    row_bytes = config.model.hidden_size * WEIGHT_BYTES[config.train.dtype]
    num_passes = 2 if config.parallelism.overlap_expert_comm else 1
    of_library = 0 if config.parallelism.dispatcher is Dispatcher.alltoall else LIBRARY_BYTES
    return of_library + num_passes * (2 * sizes.expert_rows + num_sent) * row_bytes
