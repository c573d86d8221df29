"""The table of all parameters: names, shapes, layouts, update rules and initial values; torch-free.

Everything else in this folder, the conversion of checkpoints and the initial weights derive from `TABLE`: a
new parameter is one more entry here, in its place in the forward pass, under the name that its module gives
it. A size that no parameter has yet is one more entry of `entry.DIMENSIONS`.

Sources: names and shapes are those of the released checkpoint (moonshotai/Kimi-K2.5, its safetensors index),
with routed experts as they are before INT4 packing. Update rules are Moonlight's (arXiv 2502.16982, section
2.2): Muon for matrices, AdamW for word embeddings, output layer and norms. Nothing is guessed from a shape:
the word embedding has two axes and is no matrix to Muon, stacked experts have three and are many.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from k25_train.config.model import ModelConfig
from k25_train.parameters.entry import Conversion, Initial, Kind, ParameterEntry, Site

NORMS, ATTENTION, DENSE, ROUTER = "norms", "attention", "dense FFN", "router"
EXPERTS, SHARED_EXPERTS = "routed experts", "shared experts"
EMBEDDING, OUTPUT_HEAD = "embedding", "output head"
TOWER, PROJECTOR = "vision tower", "projector"
VISION_MODULES = (TOWER, PROJECTOR)

_GAIN = Kind("a gain for each feature", initial=Initial.ones)
_BIAS = Kind("a bias", initial=Initial.zeros)
_ROUTER_BIAS = Kind("kept by the router", initial=Initial.zeros, is_buffer=True)
_WORDS = Kind("rows are words, not a map of features")
_POSITIONS = Kind("a table of positions")
_MATRIX = Kind("matrix", lambda *_: 1)
_HEADS = Kind(
    "matrix of all heads",
    lambda _shape, model, optim: model.num_attention_heads if optim.muon.per_head else 1,
    reason_per_head="one matrix per head",
)
_GROUPS = Kind(
    "matrix of all groups' heads",
    lambda _shape, model, optim: (model.num_key_value_heads or 1) if optim.muon.per_head else 1,
    reason_per_head="one matrix per head",
)
_GATE_UP = Kind("gate and up projection", lambda *_: 2)
_ROUTER = Kind("matrix; gains most from Muon (Moonlight, figure 4)", lambda *_: 1)
_EXPERTS = Kind("matrix of each expert", lambda shape, *_: shape[0])
_EXPERTS_GATE_UP = Kind("gate and up of each expert", lambda shape, *_: 2 * shape[0])
# The report starts the tower from SigLIP, so initial values of its matrices are not disclosed.
_VISION_MATRIX = Kind("matrix", lambda *_: 1, Initial.normal_by_inputs)
_QUERY_KEY_VALUE = Kind("query, key and value projection", lambda *_: 3, Initial.normal_by_inputs)
# A matrix in effect, but of raw pixels: Muon's author (K. Jordan) leaves input and output layers to AdamW.
# Kimi-VL, which has Muon for its tower, does not name this layer.
_PIXELS = Kind("input layer, as word embeddings are; our choice", initial=Initial.normal_by_inputs)


@dataclass(frozen=True)
class ParameterTable:
    """Entries in the order of the forward pass."""

    entries: tuple[ParameterEntry, ...]
    """All of them; those of a layer are listed once."""

    @cached_property
    def by_name(self) -> dict[str, ParameterEntry]:
        """Our name in the whole model, with `*` for numbers -> entry of what can be built."""
        return {entry.name: entry for entry in self.entries if entry.site is not Site.grouped}

    @cached_property
    def by_stacked_name(self) -> dict[str, ParameterEntry]:
        """Name under which training holds it, with `*` for numbers -> entry."""
        return {entry.stacked_name: entry for entry in self.entries}

    @cached_property
    def by_released_name(self) -> dict[str, ParameterEntry]:
        """Each of the checkpoint's names, with `*` for numbers -> the entry that it is part of."""
        return {name: entry for entry in self.by_name.values() for name in entry.released}

    def places(self, model: ModelConfig, *sites: Site) -> Iterator[tuple[ParameterEntry, int]]:
        """Every entry with the number of each layer or block that has it, in the order of the forward pass.

        A layer's experts are one place; what is there once has the number 0. With `sites`, those alone.
        """
        chosen = [entry for entry in self.entries if not sites or entry.site in sites]
        for _, group in groupby(chosen, key=_repeated_with):
            together = [(entry, entry.site.numbers(model)) for entry in group]
            for number in range(max(numbers.stop for _, numbers in together)):
                yield from ((entry, number) for entry, numbers in together if number in numbers)

    def in_layer(self, model: ModelConfig, layer: int) -> list[ParameterEntry]:
        """The entries that a decoder layer has, counted from 0."""
        of_layers = (entry for entry in self.entries if entry.site.is_decoder_layer)
        return [entry for entry in of_layers if layer in entry.site.numbers(model)]


def _repeated_with(entry: ParameterEntry) -> Site:
    """What entries are repeated with, number by number: decoder layers of either kind are one group."""
    return Site.layer if entry.site.is_decoder_layer else entry.site


def _once(site: Site, ours: str, released: str, shape: str, module: str, kind: Kind) -> ParameterEntry:
    """An entry of the language model outside its decoder layers."""
    names = f"language_model.{ours}.weight", (f"language_model.{released}.weight",)
    return ParameterEntry(*names, tuple(shape.split()), module, site, kind)


def _in_layer(site: Site, ours: str, released: str, shape: str, module: str, kind: Kind) -> ParameterEntry:
    """An entry of decoder layers; if it has several tensors in the checkpoint, they are joined by rows."""
    return ParameterEntry(
        f"language_model.decoder.layers.*.{ours}",
        tuple(f"language_model.model.layers.*.{name}" for name in released.split()),
        tuple(shape.split()),
        module,
        site,
        kind,
        Conversion.join_rows if " " in released else Conversion.same,
        dtype="float32" if kind.is_buffer else "bfloat16",
    )


def _norm(ours: str, released: str) -> ParameterEntry:
    """A norm of a decoder layer."""
    return _in_layer(Site.layer, f"{ours}.weight", f"{released}.weight", "hidden", NORMS, _GAIN)


def _attention(ours: str, released: str, shape: str, kind: Kind, site: Site = Site.layer) -> ParameterEntry:
    """A part of latent or grouped-query attention."""
    names = f"self_attention.{ours}.weight", f"self_attn.{released}.weight"
    return _in_layer(site, *names, shape, ATTENTION, kind)


def _swiglu(site: Site, prefix: str, width: str, module: str) -> list[ParameterEntry]:
    """The two matrices of a SwiGLU that every token of a layer passes; gate rows come first."""
    gate_up, down = f"{prefix}.gate_proj.weight {prefix}.up_proj.weight", f"{prefix}.down_proj.weight"
    return [
        _in_layer(site, f"{prefix}.linear_fc1.weight", gate_up, f"{width} hidden", module, _GATE_UP),
        _in_layer(site, f"{prefix}.linear_fc2.weight", down, f"hidden {width}", module, _MATRIX),
    ]


def _moe(ours: str, released: str, shape: str, module: str, kind: Kind) -> ParameterEntry:
    """A part of the router or of the routed experts."""
    parts = " ".join(f"mlp.{name}" for name in released.split())
    return _in_layer(Site.moe_layer, f"mlp.{ours}", parts, shape, module, kind)


def _affine(site: Site, prefix: str, shape: str, module: str, kind: Kind) -> list[ParameterEntry]:
    """A weight of tower or projector, and its bias, which is as long as the weight's first dimension."""
    weight, bias, dimensions = f"{prefix}.weight", f"{prefix}.bias", tuple(shape.split())
    conversion = Conversion.flatten if len(dimensions) == 4 else Conversion.same
    return [
        ParameterEntry(weight, (weight,), dimensions, module, site, kind, conversion),
        ParameterEntry(bias, (bias,), dimensions[:1], module, site, _BIAS),
    ]


def _tower(prefix: str, shape: str, kind: Kind) -> list[ParameterEntry]:
    return _affine(Site.vision, f"vision_tower.{prefix}", shape, TOWER, kind)


def _block(prefix: str, shape: str, kind: Kind) -> list[ParameterEntry]:
    return _affine(Site.vision_block, f"vision_tower.encoder.blocks.*.{prefix}", shape, TOWER, kind)


def _projector(prefix: str, shape: str, kind: Kind) -> list[ParameterEntry]:
    return _affine(Site.vision, f"mm_projector.{prefix}", shape, PROJECTOR, kind)


def _position_table() -> ParameterEntry:
    name, shape = "vision_tower.patch_embed.pos_emb.weight", ("pos_height", "pos_width", "tower")
    return ParameterEntry(name, (name,), shape, TOWER, Site.vision, _POSITIONS)


_WORD_EMBEDDINGS = "embedding.word_embeddings", "model.embed_tokens"
_GATE_AND_UP = "experts.*.gate_proj.weight experts.*.up_proj.weight"

TABLE = ParameterTable(
    (
        # Vision tower and projector, which keep the checkpoint's names.
        *_tower("patch_embed.proj", "tower rgb patch patch", _PIXELS),
        _position_table(),
        *_block("norm0", "tower", _GAIN),
        *_block("norm1", "tower", _GAIN),
        *_block("wqkv", "tower_qkv tower", _QUERY_KEY_VALUE),
        *_block("wo", "tower tower", _VISION_MATRIX),
        *_block("mlp.fc0", "tower_ffn tower", _VISION_MATRIX),
        *_block("mlp.fc1", "tower tower_ffn", _VISION_MATRIX),
        *_tower("encoder.final_layernorm", "tower", _GAIN),
        *_projector("pre_norm", "tower", _GAIN),
        *_projector("proj.0", "merged merged", _VISION_MATRIX),
        *_projector("proj.2", "hidden merged", _VISION_MATRIX),
        # Language model: embedding.
        _once(Site.embedding, *_WORD_EMBEDDINGS, "vocab hidden", EMBEDDING, _WORDS),
        # Every decoder layer: norms, and latent or grouped-query attention. The latter has the names of
        # Qwen3MoeAttention (transformers) on both sides: plans count it, nothing builds it.
        _norm("input_layernorm", "input_layernorm"),
        _norm("pre_mlp_layernorm", "post_attention_layernorm"),
        _attention("linear_q_proj", "q_proj", "q_of_heads hidden", _HEADS, Site.direct_query),
        _attention("linear_q_down_proj", "q_a_proj", "q_lora hidden", _MATRIX, Site.compressed_query),
        _attention("q_layernorm", "q_a_layernorm", "q_lora", _GAIN, Site.compressed_query),
        _attention("linear_q_up_proj", "q_b_proj", "q_of_heads q_lora", _HEADS, Site.compressed_query),
        _attention(
            "linear_kv_down_proj", "kv_a_proj_with_mqa", "kv_lora_and_rope hidden", _MATRIX, Site.latent
        ),
        _attention("kv_layernorm", "kv_a_layernorm", "kv_lora", _GAIN, Site.latent),
        _attention("linear_kv_up_proj", "kv_b_proj", "kv_of_heads kv_lora", _HEADS, Site.latent),
        _attention("k_proj", "k_proj", "k_of_groups hidden", _GROUPS, Site.grouped),
        _attention("v_proj", "v_proj", "k_of_groups hidden", _GROUPS, Site.grouped),
        _attention("q_norm", "q_norm", "head", _GAIN, Site.grouped),
        _attention("k_norm", "k_norm", "head", _GAIN, Site.grouped),
        _attention("linear_proj", "o_proj", "hidden v_of_heads", _MATRIX),
        # A dense layer's MLP.
        *_swiglu(Site.dense_layer, "mlp", "dense_ffn", DENSE),
        # Router, routed and shared experts of every other layer.
        _moe("router.weight", "gate.weight", "experts hidden", ROUTER, _ROUTER),
        _moe("router.expert_bias", "gate.e_score_correction_bias", "experts", ROUTER, _ROUTER_BIAS),
        _moe("experts.*.gate_up_proj", _GATE_AND_UP, "expert_ffn hidden", EXPERTS, _EXPERTS_GATE_UP),
        _moe("experts.*.down_proj", "experts.*.down_proj.weight", "hidden expert_ffn", EXPERTS, _EXPERTS),
        *_swiglu(Site.shared_experts, "mlp.shared_experts", "shared_ffn", SHARED_EXPERTS),
        # Language model: last norm and output head.
        _once(Site.head, "decoder.final_layernorm", "model.norm", "hidden", NORMS, _GAIN),
        _once(Site.head, "output_layer", "lm_head", "vocab hidden", OUTPUT_HEAD, _WORDS),
    )
)
"""The parameters of the model, in the order of the forward pass."""
