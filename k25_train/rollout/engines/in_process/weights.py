"""From the release's tensors to those of transformers' model: next to the ones in use, until a commit.

transformers converts names when it loads a model from files. An engine takes new weights every step, so each
of the release's tensors goes straight to its place: a whole parameter, an expert's rows of a stack, or the
three parts of the tower's fused projection, whose rotary pairs transformers has as halves.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from k25_train.config.model import ModelConfig
from k25_train.errors import CheckpointError
from k25_train.export.listing import ReleasedTensor, released_tensors
from k25_train.export.stream import NamedTensor
from k25_train.int4 import GROUP_SIZE, Int4Weight, dequantize
from k25_train.rollout.engines.base import EngineError

_EXPERT = re.compile(
    r"language_model\.model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight"
)
_BLOCK = re.compile(r"vision_tower\.encoder\.blocks\.(\d+)\.(.+)")
_IN_BLOCK = (
    ("norm0.", "norm1."),
    ("norm1.", "norm2."),
    ("mlp.fc0.", "mlp.fc1."),
    ("mlp.fc1.", "mlp.fc2."),
    ("wo.", "attn.proj."),
)
_OTHERS = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("mm_projector.pre_norm.", "model.mm_projector.pre_norm."),
    ("mm_projector.proj.0.", "model.mm_projector.in_proj."),
    ("mm_projector.proj.2.", "model.mm_projector.out_proj."),
    ("vision_tower.encoder.final_layernorm.", "model.vision_tower.final_layernorm."),
    (
        "vision_tower.patch_embed.pos_emb.weight",
        "model.vision_tower.patch_embed.pos_emb.position_embeddings",
    ),
    ("vision_tower.patch_embed.proj.", "model.vision_tower.patch_embed.proj."),
)
"""Beginnings of names: the release's, and transformers'."""
_PACKED = re.compile(r"(.+)_(packed|scale|shape)")
_NUM_PARTS = 3


class Place(NamedTuple):
    """Where a part of a released tensor goes."""

    name: str
    """Of transformers' tensor."""
    target: tuple[int | slice, ...]
    """Which part of it that is."""
    source: slice
    """The rows of the released tensor."""
    heads: int
    """Heads whose rotary pairs become halves; 0 for none."""


def places_of(tensor: ReleasedTensor, model: ModelConfig) -> Iterator[Place]:
    """Where a tensor of the release goes; several places where it is split."""
    everything = slice(None)
    if expert := _EXPERT.fullmatch(tensor.name):
        layer, number, part = expert.groups()
        stack = (
            f"model.language_model.layers.{layer}.mlp.experts.{'down' if part == 'down' else 'gate_up'}_proj"
        )
        width = model.expert_ffn_hidden_size
        rows = {"gate": slice(0, width), "up": slice(width, 2 * width), "down": everything}[part]
        yield Place(stack, (int(number), rows), everything, 0)
        return
    if block := _BLOCK.fullmatch(tensor.name):
        number, rest = block.groups()
        layer = f"model.vision_tower.layers.{number}."
        if rest.startswith("wqkv."):
            width, heads = model.vision.hidden_size, model.vision.num_attention_heads
            for index, (part, rotated) in enumerate((("q", heads), ("k", heads), ("v", 0))):
                name = f"{layer}attn.{part}_proj.{rest.removeprefix('wqkv.')}"
                yield Place(name, (), slice(index * width, (index + 1) * width), rotated)
            return
        yield Place(layer + _renamed(rest, _IN_BLOCK), (), everything, 0)
        return
    yield Place(_renamed(tensor.name, _OTHERS), (), everything, 0)


class Layout:
    """All tensors that a version consists of, and where they go."""

    def __init__(self, model: ModelConfig, weights: dict[str, Tensor]) -> None:
        """`weights`: transformers' tensors, by its names. Raises `EngineError` if one has no source."""
        self.tensors = {tensor.name: tensor for tensor in released_tensors(model)}
        """By the release's names."""
        self.places = {name: tuple(places_of(tensor, model)) for name, tensor in self.tensors.items()}
        """Where each goes."""
        sizes = dict.fromkeys(weights, 0)
        for name, places in self.places.items():
            for place in places:
                whole = self.tensors[name].shape
                part = torch.empty(whole, device="meta")[place.source]
                if weights[place.name][place.target].shape != part.shape:
                    raise EngineError(f"{name} {list(whole)} does not fit transformers' {place.name}")
                sizes[place.name] += part.numel()
        wrong = [name for name, size in sizes.items() if size != weights[name].numel()]
        if wrong:
            raise EngineError(f"transformers' {wrong[0]} is not made of the release's tensors alone")


class StagedWeights:
    """Weights of one version, as they come in."""

    def __init__(self, version: int, layout: Layout, weights: dict[str, Tensor]) -> None:
        """`weights`: those in use, next to which these are held."""
        self.version = version
        """The optimizer step that made them."""
        self._layout = layout
        self._tensors = {name: torch.empty_like(tensor) for name, tensor in weights.items()}
        self._missing = set(layout.tensors)
        self._packed: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def take(self, new: NamedTensor) -> None:
        """Put a tensor where it goes; one of INT4 waits for its other parts.

        Raises `EngineError` naming it if it is unknown, there already, or of another shape or kind.
        """
        packed = _PACKED.fullmatch(new.name)
        if new.name not in self._layout.tensors and packed:
            self._take_packed(packed[1], packed[2], new)
            return
        tensor = self._layout.tensors.get(new.name)
        if tensor is None:
            raise EngineError(f"{new.name} is no tensor of the model; send the release's names")
        if new.name not in self._missing:
            raise EngineError(f"{new.name} came twice for version {self.version}")
        if new.shape != tensor.shape or not new.dtype.is_floating_point:
            raise EngineError(
                f"{new.name} is {new.dtype} {list(new.shape)}, but should be a float {list(tensor.shape)}"
            )
        self._missing.remove(new.name)
        for place in self._layout.places[new.name]:
            part = new.tensor[place.source]
            self._tensors[place.name][place.target].copy_(_as_halves(part, place.heads))

    def check_complete(self) -> None:
        """Raises `EngineError` that names tensors which have not come."""
        if self._packed:
            name, parts = next(iter(self._packed.items()))
            raise EngineError(f"of {name} only {', '.join(sorted(parts))} came for version {self.version}")
        if self._missing:
            names = sorted(self._missing)
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            raise EngineError(f"version {self.version} lacks {', '.join(names[:3])}{more}")

    @torch.no_grad()
    def put_into(self, weights: dict[str, Tensor]) -> None:
        """Copy them over those in use, which stay the same tensors."""
        for name, tensor in self._tensors.items():
            weights[name].copy_(tensor)

    def _take_packed(self, name: str, part: str, new: NamedTensor) -> None:
        tensor = self._layout.tensors.get(name)
        if tensor is None or not tensor.is_expert:
            raise EngineError(f"{new.name}: {name} is no routed expert of the model; only these are packed")
        parts = self._packed.setdefault(name, {})
        if part in parts or name not in self._missing:
            raise EngineError(f"{new.name} came twice for version {self.version}")
        parts[part] = new.tensor.clone()
        if len(parts) < _NUM_PARTS:
            return
        weight = Int4Weight(parts["packed"], parts["scale"])
        rows, columns = tensor.shape
        fits = weight.shape == tensor.shape and weight.scale.shape == (rows, columns // GROUP_SIZE)
        if weight.packed.dtype != torch.int32 or not fits or tuple(parts["shape"].tolist()) != tensor.shape:
            raise EngineError(
                f"{name}: codes {list(weight.packed.shape)}, scales {list(weight.scale.shape)} and the shape "
                f"{parts['shape'].tolist()} are not those of {list(tensor.shape)} in groups of {GROUP_SIZE}"
            )
        del self._packed[name]
        try:
            values = dequantize(weight)
        except (CheckpointError, RuntimeError) as error:
            raise EngineError(f"{name}: {error}") from error
        self.take(NamedTensor(name, values))


def _renamed(name: str, beginnings: tuple[tuple[str, str], ...]) -> str:
    for theirs, own in beginnings:
        if name.startswith(theirs):
            return own + name.removeprefix(theirs)
    return name


def _as_halves(part: Tensor, heads: int) -> Tensor:
    """[heads · d, …] with each head's rows in pairs -> first all first ones of the pairs, then all second."""
    if not heads:
        return part
    return part.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
