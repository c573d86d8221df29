"""Kernels of the first part of a decoder layer: norm, attention, residual; torch-free.

Bytes are what this project's code moves (`k25_train/model/attention.py`): rotary embedding in float32 by
torch's operations, queries and keys joined from their parts. Norms are torch's fused RMSNorm, whose gradient
reads input and gradient and writes one.
"""

from collections.abc import Iterator
from dataclasses import replace

from k25_train.config.cluster import Device
from k25_train.config.model import ModelConfig
from k25_train.plan.cause import Cause
from k25_train.plan.kernels.kernel import FLOAT32_BYTES, Attention, Precision
from k25_train.plan.kernels.work import CAST_BYTES, Phase, Setting, Work, again
from k25_train.plan.memory.kernels import AttentionKernel
from k25_train.plan.memory.latents import key_value_width
from k25_train.plan.projections import OUTPUT, Projection, attention_projections

NORM_BYTES = 2, 3
"""Times that a norm's features are moved, forward and backward."""
ROTATION_BYTES = 16
"""Bytes moved in float32 for each element that is rotated: converted, multiplied as a complex number, and
converted back, next to reading and writing it in the model's format."""
SHORT_KERNELS = 12
"""Launches of one rotary embedding, joined from parts."""
MERGE_KERNELS = 4
"""Launches in which the output of one block of keys is added to those before."""
FLASH_2_SHARES = 0.57, 0.62
"""Rate of FlashAttention 2 on Hopper over that of its successors, forward and backward. Source: 1.5 to 2 and
1.5 to 1.75 times faster, FlashAttention-3 (arXiv 2407.08608)."""
KEY_VALUE_UP = "key-value up"
"""Name of the projection from latents to all heads' keys and values."""


def norm(setting: Setting, name: str, width: int, *, made_again: str) -> list[Work]:
    """An RMSNorm of all tokens."""
    num_bytes = setting.tokens * width * setting.element_bytes
    forward, backward = (times * num_bytes for times in NORM_BYTES)
    return setting.moved(name, forward, backward, launches=(1, 2), made_again=made_again)


def attention_works(setting: Setting) -> Iterator[Work]:
    """Norm, projections, attention, output projection and residual of one layer."""
    model, tokens, element = setting.config.model, setting.tokens, setting.element_bytes
    heads = model.num_attention_heads
    # 1. To the compressed query and key-value if there are any, and from there to heads.
    yield from norm(setting, "norm", model.hidden_size, made_again="norm.output")
    projections = {each.name: each for each in attention_projections(model)}
    output = projections.pop(OUTPUT)
    for name, each in projections.items():
        if name == KEY_VALUE_UP and setting.sizes.cp > 1:
            yield from _shared_keys(setting, each)
            continue
        yield from setting.projected(each, tokens, made_again="mla.up_proj" if name.endswith(" up") else "")
    if model.has_latent_attention:
        latents = sum(model.query_widths[1:-1]) + sum(model.key_value_widths[1:-1])
        yield from norm(setting, "latent norms", latents, made_again="mla.up_input")
    else:
        width = (heads + _key_value_heads(model)) * model.q_head_dim
        yield from norm(setting, "norms of heads", width, made_again="mla.up_input")
    yield from _heads(setting)
    # 2. Over documents.
    yield from _over_documents(setting)
    # 3. Back to features.
    joined = tokens * heads * model.v_head_dim * element
    if setting.kernels.attention is not AttentionKernel.transformer_engine:
        yield from setting.moved("joined", 2 * joined, 2 * joined, made_again="attention.joined")
    yield from setting.projected(output, tokens)
    yield from setting.moved("residual", 3 * tokens * model.hidden_size * element, 0, launches=(1, 0))


def _shared_keys(setting: Setting, projection: Projection) -> Iterator[Work]:
    """Keys and values where ranks share sequences: each makes those of all tokens that it attends to from
    their latents, and in its backward pass again, whatever is kept."""
    own, every = setting.tokens, setting.sizes.made_keys
    yield from setting.projected(projection, own)
    # What other ranks compute as well, and all of it once more.
    repeated = [*setting.projected(projection, every - own)]
    yield from (replace(each, cause=Cause.recompute) for each in repeated)
    yield from again(setting.projected(projection, every))


def _heads(setting: Setting) -> list[Work]:
    """Queries and keys are rotated and joined, values copied."""
    if setting.config.model.has_latent_attention and setting.sizes.cp > 1:
        return _shared_heads(setting)
    model, element = setting.config.model, setting.element_bytes
    groups = _key_value_heads(model)
    # Elements of a token that are read or written.
    queries = 2 * model.num_attention_heads * model.q_head_dim
    keys_values = 2 * groups * (model.q_head_dim + model.v_head_dim)
    rotated = model.num_attention_heads * model.qk_rope_head_dim
    launches = 2
    if setting.fuses_elementwise:
        # Only the rotated part of queries, in place.
        num_bytes = setting.tokens * element * (2 * rotated + keys_values)
    else:
        num_bytes = setting.tokens * element * (queries + keys_values)
        num_bytes += setting.tokens * rotated * (2 * element + ROTATION_BYTES)
        launches = 2 * SHORT_KERNELS
    return setting.moved(
        "heads", num_bytes, num_bytes, launches=(launches, launches), made_again="mla.up_proj"
    )


def _shared_heads(setting: Setting) -> list[Work]:
    """The same where ranks share sequences: keys are rotated before they are sent, and made twice."""
    model, element = setting.config.model, setting.element_bytes
    rotated = model.num_attention_heads * model.qk_rope_head_dim
    queries = 2 * model.num_attention_heads * model.q_head_dim * element + rotated * (
        2 * element + ROTATION_BYTES
    )
    num_bytes = setting.tokens * queries
    launches = (SHORT_KERNELS, SHORT_KERNELS)
    found = setting.moved("heads", num_bytes, num_bytes, launches=launches, made_again="mla.up_proj")
    num_bytes = setting.sizes.made_keys * 2 * key_value_width(model) * element
    blocks = setting.sizes.num_blocks
    keys = setting.moved("keys of other ranks", num_bytes, num_bytes, launches=(2 * blocks, 2 * blocks))
    return [*found, *keys, *again(keys)]


def _key_value_heads(model: ModelConfig) -> int:
    """Heads of keys and values: as many as of queries, unless queries share them in groups."""
    return model.num_key_value_heads or model.num_attention_heads


def _over_documents(setting: Setting) -> Iterator[Work]:
    """Attention, forward and backward; and logits once more where QK-Clip takes their largest."""
    config, pairs, tokens = setting.config, setting.sizes.token_pairs, setting.tokens
    model, precision = config.model, setting.of_attention
    heads = model.num_attention_heads, model.q_head_dim, model.v_head_dim
    ahead, back = _rate_shares(setting)
    forward = Attention("attention", pairs, tokens, *heads, rate_share=ahead)
    backward = Attention("attention, backward", pairs, tokens, *heads, is_backward=True, rate_share=back)
    yield Work(Phase.forward, Cause.compute, forward, precision)
    yield from _merged(setting)
    if precision is Precision.fp8:
        width = 2 * model.q_head_dim + model.v_head_dim
        num_bytes = tokens * model.num_attention_heads * width * CAST_BYTES
        yield from setting.moved("attention in FP8", num_bytes, num_bytes)
    yield Work(Phase.backward, Cause.compute, backward, precision)
    if config.optim.qk_clip_threshold is not None:
        # On average over steps.
        every = config.optim.qk_clip_interval
        logits = Attention("largest logits", pairs / every, tokens / every, *heads[:2], 0)
        yield Work(Phase.forward, Cause.recompute, logits, setting.plain)


def _rate_shares(setting: Setting) -> tuple[float, float]:
    """Of the device's rates, forward and backward. Where ranks share sequences, attention to a block is
    FlashAttention 2, whose heads of queries and values are of one size."""
    on_gpu = setting.config.cluster.device is Device.cuda and setting.plain is Precision.bfloat16
    if setting.sizes.cp == 1 or not on_gpu:
        return 1.0, 1.0
    query, value = setting.config.model.q_head_dim, setting.config.model.v_head_dim
    padded = (query + value) / (2 * query), (3 * query + 2 * value) / (5 * query)
    return FLASH_2_SHARES[0] * padded[0], FLASH_2_SHARES[1] * padded[1]


def _merged(setting: Setting) -> list[Work]:
    """Outputs of the blocks of a ring, each weighted by its sum and added to those before, in float32; and
    gradients of queries, which blocks add up."""
    sizes, model, element = setting.sizes, setting.config.model, setting.element_bytes
    blocks = sizes.num_blocks
    if sizes.cp == 1 or blocks == 1:
        return []
    heads, each = setting.tokens * model.num_attention_heads, 2 * FLOAT32_BYTES + element
    forward, backward = heads * model.v_head_dim * each, heads * model.q_head_dim * each
    launches = MERGE_KERNELS * blocks, blocks
    return setting.moved("merged blocks", blocks * forward, blocks * backward, launches=launches)
