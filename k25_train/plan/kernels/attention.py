"""Kernels of the first part of a decoder layer: norm, attention, residual; torch-free.

Bytes are what this project's code moves (`k25_train/model/attention.py`): rotary embedding in float32 by
torch's operations, queries and keys joined from their parts. Norms are torch's fused RMSNorm, whose gradient
reads input and gradient and writes one.
"""

from collections.abc import Iterator

from k25_train.config.model import ModelConfig
from k25_train.plan.cause import Cause
from k25_train.plan.kernels.kernel import Attention, Precision
from k25_train.plan.kernels.work import CAST_BYTES, Phase, Setting, Work
from k25_train.plan.memory.kernels import AttentionKernel
from k25_train.plan.projections import OUTPUT, attention_projections

NORM_BYTES = 2, 3
"""Times that a norm's features are moved, forward and backward."""
ROTATION_BYTES = 16
"""Bytes moved in float32 for each element that is rotated: converted, multiplied as a complex number, and
converted back, next to reading and writing it in the model's format."""
SHORT_KERNELS = 12
"""Launches of one rotary embedding, joined from parts."""


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


def _heads(setting: Setting) -> list[Work]:
    """Queries and keys are rotated and joined, values copied."""
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


def _key_value_heads(model: ModelConfig) -> int:
    """Heads of keys and values: as many as of queries, unless queries share them in groups."""
    return model.num_key_value_heads or model.num_attention_heads


def _over_documents(setting: Setting) -> Iterator[Work]:
    """Attention, forward and backward; and logits once more where QK-Clip takes their largest."""
    config, pairs, tokens = setting.config, setting.sizes.token_pairs, setting.tokens
    model, precision = config.model, setting.of_attention
    heads = model.num_attention_heads, model.q_head_dim, model.v_head_dim
    forward = Attention("attention", pairs, tokens, *heads)
    backward = Attention("attention, backward", pairs, tokens, *heads, is_backward=True)
    yield Work(Phase.forward, Cause.compute, forward, precision)
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
