"""Tokens on their way to experts and back, as far as no backward pass saves them; torch-free."""

from k25_train.config.schema import Config
from k25_train.plan.pass_sizes import PassSizes
from k25_train.plan.pipeline import StagePlan
from k25_train.plan.weight_bytes import WEIGHT_BYTES
from parallel.dispatcher import Dispatcher

LIBRARY_BYTES = 1 << 30
"""Buffers that DeepEP, HybridEP and NCCL EP register for NVLink and the network. Source: not disclosed for
this size and not measured; our choice."""


FORWARD_ROWS, BACKWARD_ROWS = 3, 4
"""Tensors of the rows that a rank's experts get, as far as no backward pass saves them: forward, tokens
sorted for sending and as they arrive, and outputs by expert; backward, the gradient of each step of the way
back and its result. Held against what is alive in a layer's pass (tests/unit/plan/test_layer_peak.py)."""


def row_bytes(config: Config, sizes: PassSizes) -> int:
    """One tensor of the rows that a rank sends to experts or gets, whichever are more."""
    num_sent = (sizes.tokens - sizes.padding_tokens) * config.model.num_experts_per_token
    width = config.model.hidden_size * WEIGHT_BYTES[config.train.dtype]
    return max(sizes.expert_rows, num_sent) * width


def exchange_bytes(stage: StagePlan, sizes: PassSizes) -> int:
    """What the exchanges of a MoE layer take at most, of all passes that run at a time.

    The overlapped schedule has a forward and a backward pass in the same layer's exchanges. Dispatchers that
    send a token once per rank have no more rows, and buffers of their own.
    """
    config = stage.config
    if not any(config.model.is_moe(layer) for chunk in stage.chunks for layer in chunk.layers):
        return 0
    num_rows = BACKWARD_ROWS + FORWARD_ROWS * config.parallelism.overlap_expert_comm
    of_library = 0 if config.parallelism.dispatcher is Dispatcher.alltoall else LIBRARY_BYTES
    return of_library + num_rows * row_bytes(config, sizes)
