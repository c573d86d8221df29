"""Types of the entries in the table of parameters: everything that it says about one of them.

One entry is for all parameters that differ only in the numbers of their layers and experts. In names, `*` is
the place of such a number.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from math import prod

from k25_train.config.model import ModelConfig
from k25_train.config.optimizer import OptimConfig

Blocks = Callable[[tuple[int, ...], ModelConfig, OptimConfig], int]
"""From a parameter's shape, as training holds it, to the number of matrices in it."""

DIMENSIONS: dict[str, Callable[[ModelConfig], int]] = {
    "hidden": lambda model: model.hidden_size,
    "vocab": lambda model: model.vocab_size,
    # Of what is only in layers with a compressed query.
    "q_lora": lambda model: model.query_widths[-2],
    # Of what is only in layers with latent attention.
    "kv_lora": lambda model: model.key_value_widths[-2],
    "kv_lora_and_rope": lambda model: model.key_value_widths[-2] + model.qk_rope_head_dim,
    "q_of_heads": lambda model: model.num_attention_heads * model.q_head_dim,
    "kv_of_heads": lambda model: model.key_value_widths[-1],
    # Of what is only in layers with grouped-query attention, whose keys are as wide as values.
    "k_of_groups": lambda model: model.key_value_widths[-1] // 2,
    "head": lambda model: model.q_head_dim,
    "v_of_heads": lambda model: model.num_attention_heads * model.v_head_dim,
    "dense_ffn": lambda model: model.dense_ffn_hidden_size,
    "experts": lambda model: model.num_experts,
    "expert_ffn": lambda model: model.expert_ffn_hidden_size,
    # The shared experts are one SwiGLU of their summed width.
    "shared_ffn": lambda model: model.num_shared_experts * model.expert_ffn_hidden_size,
    "rgb": lambda _: 3,
    "patch": lambda model: model.vision.patch_size,
    "pos_height": lambda model: model.vision.pos_emb_height,
    "pos_width": lambda model: model.vision.pos_emb_width,
    "tower": lambda model: model.vision.hidden_size,
    "tower_qkv": lambda model: 3 * model.vision.hidden_size,
    "tower_ffn": lambda model: model.vision.ffn_hidden_size,
    "merged": lambda model: model.vision.merged_size,
}
"""Names of dimensions in the table's shapes -> sizes."""

_NUMBER = re.compile(r"(?<=\.layers\.)\d+(?=\.)|(?<=\.blocks\.)\d+(?=\.)|(?<=\.experts\.)\d+(?=\.)")


class Site(Enum):
    """Where in the model a parameter is, and so how many there are of it, apart from experts."""

    vision = "vision"
    """Once in tower or projector."""
    vision_block = "vision block"
    """In every block of the tower."""
    embedding = "embedding"
    """Once, in the chunk that embeds tokens."""
    layer = "layer"
    """In every decoder layer."""
    compressed_query = "layer that compresses queries"
    """In every decoder layer, if the model compresses queries."""
    direct_query = "layer that does not compress queries"
    """In every decoder layer, if the model does not."""
    latent = "layer with latent attention"
    """In every decoder layer, if the model has latent attention."""
    grouped = "layer with grouped-query attention"
    """In every decoder layer, if the model has grouped-query attention."""
    dense_layer = "dense layer"
    """In every decoder layer with a dense MLP."""
    moe_layer = "MoE layer"
    """In every decoder layer with routed experts."""
    shared_experts = "MoE layer with shared experts"
    """In every decoder layer with routed experts, if the model has shared ones too."""
    head = "head"
    """Once, after the last decoder layer."""

    @property
    def is_decoder_layer(self) -> bool:
        """Whether it is in decoder layers, of whichever kind."""
        return self not in (Site.vision, Site.vision_block, Site.embedding, Site.head)

    def numbers(self, model: ModelConfig) -> range:
        """Numbers of the layers or blocks that have it; 0 alone for what is there once."""
        is_there = {
            Site.vision: model.has_vision,
            Site.compressed_query: model.compresses_query,
            Site.direct_query: not model.compresses_query,
            Site.latent: model.has_latent_attention,
            Site.grouped: not model.has_latent_attention,
            Site.shared_experts: model.num_shared_experts > 0,
        }
        if not is_there.get(self, True):
            return range(0)
        if self is Site.vision_block:
            return range(model.vision.num_layers)
        if self is Site.dense_layer:
            return range(model.num_dense_layers)
        if self in (Site.moe_layer, Site.shared_experts):
            return range(model.num_dense_layers, model.num_layers)
        return range(model.num_layers if self.is_decoder_layer else 1)


class Conversion(Enum):
    """How a parameter is made of the released checkpoint's tensors; values and dtypes are never touched."""

    same = "same"
    """One tensor, unchanged."""
    join_rows = "join rows"
    """Several matrices of one shape, one above the other."""
    flatten = "flatten"
    """A [C, 3, p, p] convolution over single patches as the [C, 3·p²] matrix that it is."""


class Initial(Enum):
    """What a parameter starts from."""

    zeros = "zeros"
    """All elements are 0."""
    ones = "ones"
    """All elements are 1."""
    normal = "normal"
    """Normal with the standard deviation `model.init_std`."""
    normal_by_inputs = "normal by inputs"
    """Normal with the standard deviation 1/sqrt(inputs)."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a parameter is to the optimizer, and what it starts from."""

    reason: str
    """Why it has its update rule, in a few words."""
    blocks: Blocks | None = None
    """Number of matrices that Muon sees in it; None where AdamW is always the rule."""
    initial: Initial = Initial.normal
    """What it starts from."""
    reason_per_head: str | None = None
    """The reason where `optim.muon.per_head` is on, if it differs."""
    is_buffer: bool = False
    """Whether it is a buffer, which its module updates and not the optimizer."""


@dataclass(frozen=True, slots=True)
class ParameterEntry:
    """One line of the table: all that is known of a parameter, or of a buffer that the checkpoint has too."""

    name: str
    """Name in the whole model: megatron-core's, or the checkpoint's in tower and projector."""
    released: tuple[str, ...]
    """Names of the released checkpoint's tensors that it is made of; each has as many `*` as `name`."""
    dimensions: tuple[str, ...]
    """Shape of each of the checkpoint's tensors, in names of `DIMENSIONS`; matrices are [out, in]."""
    module: str
    """Part of the model in which it is counted."""
    site: Site
    """Where it is in the model."""
    kind: Kind
    """What it is to the optimizer, and what it starts from."""
    conversion: Conversion = Conversion.same
    """How it is made of the checkpoint's tensors."""
    dtype: str = "bfloat16"
    """Number format in the checkpoint."""

    @property
    def is_expert(self) -> bool:
        """Whether every routed expert has one; training holds those of a layer stacked."""
        return ".mlp.experts.*." in self.name

    @property
    def stacked_name(self) -> str:
        """The name under which training holds it: for experts, that of the stack."""
        return self.name.replace(".mlp.experts.*.", ".mlp.experts.")

    def released_shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Shape of each of the checkpoint's tensors."""
        return tuple(DIMENSIONS[name](model) for name in self.dimensions)

    def stacked_shape(self, model: ModelConfig) -> tuple[int, ...]:
        """The shape in which training holds it, with all experts of the layer."""
        shape = self.released_shape(model)
        if self.conversion is Conversion.flatten:
            shape = (shape[0], prod(shape[1:]))
        elif self.conversion is Conversion.join_rows:
            shape = (len(self.released) * shape[0], *shape[1:])
        return (model.num_experts, *shape) if self.is_expert else shape


@cache
def pattern_of(name: str) -> str:
    """A name, ours or the checkpoint's, with `*` for the numbers of layer, block and expert."""
    return _NUMBER.sub("*", name)


def numbers_in(name: str) -> list[str]:
    """The numbers that `pattern_of` leaves out, in order."""
    return _NUMBER.findall(name)


@cache
def fill(pattern: str, *numbers: object) -> str:
    """Put numbers in the places of `*`, in order; more numbers than places are ignored."""
    remaining = iter(numbers)
    return re.sub(r"\*", lambda _: str(next(remaining)), pattern)
