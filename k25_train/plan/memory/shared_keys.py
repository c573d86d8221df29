"""What attention holds at a time where ranks share a sequence: keys and values of other ranks; torch-free.

Latents of all tokens, or of one rank's at a time, become keys and values, in the backward pass again, with
gradients of both; none of it is saved (`parallel/context/attention.py`, in whose order it is listed here).
"""

from k25_train.config.schema import Config
from k25_train.plan.memory.kernels import block_kernel, configured_kernels
from k25_train.plan.memory.latents import latent_width
from k25_train.plan.memory.saved_tensor import FLOAT_BYTES
from k25_train.plan.pass_sizes import PassSizes
from k25_train.plan.weight_bytes import WEIGHT_BYTES
from parallel.config import ContextExchange

BLOCKS = {ContextExchange.all_gather: (1, 2), ContextExchange.ring: (2, 3)}
"""Blocks of latents, and of their float32 gradients. All-gathered, gradients and what is received of them; in
a ring, latents in use and on their way, and gradients of this rank, on their way out and in."""


def shared_key_bytes(config: Config, sizes: PassSizes) -> int:
    """What one layer's attention takes for keys and values in its backward pass, which holds the most.

    Nothing where a rank has all tokens of its sequences.
    """
    if sizes.cp == 1:
        return 0
    model, element = config.model, WEIGHT_BYTES[config.train.dtype]
    heads, query, value = model.num_attention_heads, model.q_head_dim, model.v_head_dim
    pads = block_kernel(configured_kernels(config).attention).pads_values
    # 1. Latents, and their gradients, which ranks add up; and those that queries attend to.
    latents, gradients = BLOCKS[sizes.exchange]
    found = sizes.block_tokens * latent_width(model) * (latents * element + gradients * FLOAT_BYTES)
    found += sizes.held_keys * latent_width(model) * (element + FLOAT_BYTES)
    # 2. Keys and values, their gradients, and these side by side; a kernel may take heads of one size only.
    width = 2 * (query + value) + model.qk_nope_head_dim + value + pads * (query + query - value)
    found += sizes.held_keys * heads * width * element
    # 3. Gradients of queries: of one block, in its kernel's own float32, and added up over blocks.
    added = FLOAT_BYTES if sizes.exchange is ContextExchange.ring else element
    found += sizes.tokens * heads * query * (FLOAT_BYTES + element + added)
    return found + pads * 2 * sizes.tokens * heads * query * element
