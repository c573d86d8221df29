"""Matrices that a token passes in the language model: the one list that FLOPs and kernels are counted from.

Torch-free. Attention's products over the context have no weights and are not in it.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

from k25_train.config.model import ModelConfig

OUTPUT = "attention's output"
"""Name of the projection from heads to features."""


@dataclass(frozen=True, slots=True)
class Projection:
    """One matrix by which features are multiplied."""

    name: str
    """What it makes."""
    inputs: int
    """Width of what it reads."""
    outputs: int
    """Width of what it makes."""
    copies: int = 1
    """How many experts' matrices of this size each token passes."""

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds per token."""
        return self.copies * self.inputs * self.outputs


def attention_projections(model: ModelConfig) -> tuple[Projection, ...]:
    """Those around attention: of latent attention five, or four if queries are not compressed; of
    grouped-query attention three. The last of each kind makes all heads' queries, or keys and values."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    query = _steps("query", model.query_widths)
    key_value = _steps("key-value", model.key_value_widths)
    if model.has_latent_attention:
        # The rotary key of all heads comes from the features, with the compressed key-value.
        down, up = key_value
        key_value = replace(down, outputs=down.outputs + model.qk_rope_head_dim), up
    return (*query, *key_value, Projection(OUTPUT, heads * model.v_head_dim, hidden))


def _steps(name: str, widths: tuple[int, ...]) -> tuple[Projection, ...]:
    """From features to heads, over a compressed form if there is one."""
    names = (name,) if len(widths) == 2 else (f"{name} down", f"{name} up")
    return tuple(Projection(each, *sizes) for each, sizes in zip(names, pairwise(widths), strict=True))


def feed_forward_projections(model: ModelConfig, layer: int) -> tuple[Projection, ...]:
    """Those after attention in a decoder layer, counted from 0: experts and router, or a dense SwiGLU."""
    if not model.is_moe(layer):
        return swiglu_projections("dense", model.hidden_size, model.dense_ffn_hidden_size)
    return moe_projections(model)


def moe_projections(model: ModelConfig) -> tuple[Projection, ...]:
    """Those of a layer's router, shared and routed experts."""
    hidden, width = model.hidden_size, model.expert_ffn_hidden_size
    found: tuple[Projection, ...] = (Projection("router", hidden, model.num_experts),)
    if model.num_shared_experts:
        found += swiglu_projections("shared expert", hidden, model.num_shared_experts * width)
    return found + swiglu_projections("experts", hidden, width, model.num_experts_per_token)


def head_projection(model: ModelConfig) -> Projection:
    """The output head's."""
    return Projection("head", model.hidden_size, model.vocab_size)


def swiglu_projections(part: str, hidden: int, width: int, copies: int = 1) -> tuple[Projection, ...]:
    """Gates and values as one matrix, and the way back."""
    up = Projection(f"{part}: up", hidden, 2 * width, copies)
    return up, Projection(f"{part}: down", width, hidden, copies)
