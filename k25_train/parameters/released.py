"""Every parameter of the model, counted from the configuration without building it.

Names and shapes are those of the released checkpoint (moonshotai/Kimi-K2.5), with routed experts as they are
before INT4 packing. The buffer that the checkpoint holds beside the parameters (the router's correction bias)
is listed as well and marked, since a checkpoint map needs it, but is not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from k25_train.config.model import ModelConfig, VisionConfig


class TensorSpec(NamedTuple):
    """One tensor of the checkpoint."""

    name: str
    """Name in the checkpoint."""
    shape: tuple[int, ...]
    """Shape in the checkpoint; matrices are [out, in]."""
    module: str
    """Part of the model, as the table names it."""
    dtype: str = "bfloat16"
    """Number format in the checkpoint."""
    is_buffer: bool = False
    """Whether it is kept by a rule of its own instead of being trained by the optimizer."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleCount:
    """Parameters of one part of the model."""

    module: str
    """Name of the part."""
    num_tensors: int
    """Trained tensors."""
    total: int
    """Parameters."""
    active: int
    """Parameters that one token of text passes; an image's tokens pass vision instead of the embedding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Parameters of the model, by part and in sum."""

    modules: tuple[ModuleCount, ...]
    """Parts in the order of the forward pass."""
    total: int
    """All parameters."""
    active: int
    """Parameters of the language model that a token of text uses, both embeddings included."""
    active_without_embedding: int
    """The same without the input table, of which a token reads one row."""
    vision: int
    """Parameters of vision tower and projector."""


EXPERTS = "routed experts"
VISION_MODULES = ("vision tower", "projector")
EMBEDDING = "embedding"


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters of every part of the model."""
    sizes: dict[str, list[int]] = {}
    for tensor in iterate_tensors(model):
        if not tensor.is_buffer:
            sizes.setdefault(tensor.module, []).append(tensor.size)
    modules = tuple(
        ModuleCount(
            module=module,
            num_tensors=len(numbers),
            total=sum(numbers),
            active=active_size(model, module, sum(numbers)),
        )
        for module, numbers in sizes.items()
    )
    active = sum(module.active for module in modules)
    embedding = sum(module.active for module in modules if module.module == EMBEDDING)
    return ParameterCount(
        modules=modules,
        total=sum(module.total for module in modules),
        active=active,
        active_without_embedding=active - embedding,
        vision=sum(module.total for module in modules if module.module in VISION_MODULES),
    )


def active_size(model: ModelConfig, module: str, size: int) -> int:
    """How many of a part's parameters one token of text uses."""
    if module in VISION_MODULES:
        return 0
    if module == EXPERTS:
        return size // model.num_experts * model.num_experts_per_token
    return size


def iterate_tensors(model: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of the model's checkpoint, in the order of the forward pass."""
    yield from vision_tensors(model.vision)
    yield from projector_tensors(model.vision, model.hidden_size)
    root = "language_model.model"
    table = (model.vocab_size, model.hidden_size)
    yield TensorSpec(f"{root}.embed_tokens.weight", table, EMBEDDING)
    for layer in range(model.num_layers):
        yield from layer_tensors(model, layer)
    yield TensorSpec(f"{root}.norm.weight", (model.hidden_size,), "norms")
    yield TensorSpec("language_model.lm_head.weight", table, "output head")


def layer_tensors(model: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    """Every tensor of one decoder layer, counted from 0."""
    prefix = f"language_model.model.layers.{layer}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield TensorSpec(f"{prefix}.{norm}.weight", (model.hidden_size,), "norms")
    yield from attention_tensors(model, f"{prefix}.self_attn")
    if not model.is_moe(layer):
        yield from swiglu_tensors(model, f"{prefix}.mlp", model.dense_ffn_hidden_size, "dense FFN")
    else:
        yield from moe_tensors(model, f"{prefix}.mlp")


def attention_tensors(model: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    """Multi-head latent attention of one layer."""
    heads = model.num_attention_heads
    shapes = {
        "q_a_proj": (model.q_lora_rank, model.hidden_size),
        "q_a_layernorm": (model.q_lora_rank,),
        "q_b_proj": (heads * model.q_head_dim, model.q_lora_rank),
        "kv_a_proj_with_mqa": (model.kv_lora_rank + model.qk_rope_head_dim, model.hidden_size),
        "kv_a_layernorm": (model.kv_lora_rank,),
        "kv_b_proj": (heads * (model.qk_nope_head_dim + model.v_head_dim), model.kv_lora_rank),
        "o_proj": (model.hidden_size, heads * model.v_head_dim),
    }
    for name, shape in shapes.items():
        yield TensorSpec(f"{prefix}.{name}.weight", shape, "attention")


def moe_tensors(model: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    """Router, routed and shared experts of one layer."""
    gate = f"{prefix}.gate"
    yield TensorSpec(f"{gate}.weight", (model.num_experts, model.hidden_size), "router")
    yield TensorSpec(
        f"{gate}.e_score_correction_bias", (model.num_experts,), "router", dtype="float32", is_buffer=True
    )
    for expert in range(model.num_experts):
        yield from swiglu_tensors(model, f"{prefix}.experts.{expert}", model.expert_ffn_hidden_size, EXPERTS)
    # The shared experts are one SwiGLU of their summed width.
    width = model.num_shared_experts * model.expert_ffn_hidden_size
    yield from swiglu_tensors(model, f"{prefix}.shared_experts", width, "shared experts")


def swiglu_tensors(model: ModelConfig, prefix: str, width: int, module: str) -> Iterator[TensorSpec]:
    """One SwiGLU of the given width."""
    for name in ("gate_proj", "up_proj"):
        yield TensorSpec(f"{prefix}.{name}.weight", (width, model.hidden_size), module)
    yield TensorSpec(f"{prefix}.down_proj.weight", (model.hidden_size, width), module)


def vision_tensors(vision: VisionConfig) -> Iterator[TensorSpec]:
    """MoonViT-3D."""
    width, hidden = vision.hidden_size, vision.ffn_hidden_size
    root = "vision_tower"
    tower = VISION_MODULES[0]
    patch = (width, 3, vision.patch_size, vision.patch_size)
    yield from affine(f"{root}.patch_embed.proj", patch, tower)
    table = (vision.pos_emb_height, vision.pos_emb_width, width)
    yield TensorSpec(f"{root}.patch_embed.pos_emb.weight", table, tower)
    for block in range(vision.num_layers):
        prefix = f"{root}.encoder.blocks.{block}"
        shapes = {
            "norm0": (width,),
            "norm1": (width,),
            "wqkv": (3 * width, width),
            "wo": (width, width),
            "mlp.fc0": (hidden, width),
            "mlp.fc1": (width, hidden),
        }
        for name, shape in shapes.items():
            yield from affine(f"{prefix}.{name}", shape, tower)
    yield from affine(f"{root}.encoder.final_layernorm", (width,), tower)


def projector_tensors(vision: VisionConfig, text_hidden_size: int) -> Iterator[TensorSpec]:
    """The projector from merged patches to the language model's width."""
    projector = VISION_MODULES[1]
    merged = vision.merged_size
    yield from affine("mm_projector.pre_norm", (vision.hidden_size,), projector)
    yield from affine("mm_projector.proj.0", (merged, merged), projector)
    yield from affine("mm_projector.proj.2", (text_hidden_size, merged), projector)


def affine(prefix: str, shape: tuple[int, ...], module: str) -> Iterator[TensorSpec]:
    """A weight and its bias, whose length is the weight's first dimension."""
    yield TensorSpec(f"{prefix}.weight", shape, module)
    yield TensorSpec(f"{prefix}.bias", shape[:1], module)
