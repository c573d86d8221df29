"""What attention holds at a time where ranks share a sequence: keys and values of other ranks; torch-free.

Latents of all tokens, or of one rank's at a time, become keys and values, in the backward pass again, where
gradients of both are added up; none of it is saved (`model/context_attention.py`).
"""

from k25_train.config.schema import Config
from k25_train.plan.memory.kernels import configured_kernels
from k25_train.plan.memory.latents import latent_width
from k25_train.plan.memory.saved_tensor import FLOAT_BYTES
from k25_train.plan.pass_sizes import PassSizes
from k25_train.plan.weight_bytes import WEIGHT_BYTES
from parallel.config import ContextExchange

RING_BLOCKS = 2
"""Ranks' latents that a ring holds: those in use, and those on their way."""


def shared_key_bytes(config: Config, sizes: PassSizes) -> int:
    """What one layer's attention takes for keys and values in its backward pass, which holds the most.

    Nothing where a rank has all tokens of its sequences.
    """
    if sizes.cp == 1:
        return 0
    model, element = config.model, WEIGHT_BYTES[config.train.dtype]
    is_ring = sizes.exchange is ContextExchange.ring
    # 1. Latents, and their gradients, which are added up in float32.
    blocks = RING_BLOCKS if is_ring else 1
    found = blocks * sizes.key_tokens * latent_width(model) * (element + FLOAT_BYTES)
    # 2. Keys and values with their gradients.
    heads, width = model.num_attention_heads, model.q_head_dim + model.v_head_dim
    if configured_kernels(config).attention.pads_values:
        width = 2 * model.q_head_dim
    found += 2 * sizes.key_tokens * heads * width * element
    # 3. The gradient of queries, which each block adds to.
    return found + sizes.tokens * heads * model.q_head_dim * (FLOAT_BYTES if is_ring else element)
