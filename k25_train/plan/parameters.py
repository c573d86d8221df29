"""Parameters of the model with the rules by which they are updated, each made once for a plan; torch-free."""

from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

from k25_train.config.optimizer import OptimName
from k25_train.config.schema import Config
from k25_train.config.vision import VisionPart
from k25_train.parameters.megatron import (
    TrainedParameter,
    embedding_parameter,
    head_parameters,
    layer_parameters,
    vision_parameters,
)
from k25_train.parameters.update_rules import is_trained, rule_of

MODULE_ORDER = (
    ".input_layernorm.",
    ".self_attention.linear_proj.",
    ".self_attention.linear_q_down_proj.",
    ".self_attention.linear_q_up_proj.",
    ".self_attention.linear_q_proj.",
    ".self_attention.linear_kv_down_proj.",
    ".self_attention.linear_kv_up_proj.",
    ".self_attention.q_layernorm.",
    ".self_attention.kv_layernorm.",
    ".pre_mlp_layernorm.",
)
"""Order in which a decoder layer of megatron-core has its parameters; what is not listed comes after them."""


class RuledParameter(NamedTuple):
    """A parameter and what becomes of it."""

    size: int
    """Elements, all experts of the layer included."""
    is_expert: bool
    """Whether it is cut over expert-parallel ranks."""
    update: OptimName | None
    """Rule of its update; None if it is frozen."""
    matrix_size: int
    """Elements of what Muon orthogonalises at once; 0 without Muon."""


class ModelParameters:
    """Parameters of a configuration's model, in the order in which modules have them. Layers of a kind are
    alike."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._layers: dict[bool, tuple[RuledParameter, ...]] = {}

    def layer(self, number: int) -> tuple[RuledParameter, ...]:
        """Those of a decoder layer, counted from 0."""
        is_moe = self._config.model.is_moe(number)
        if is_moe not in self._layers:
            listed = sorted(layer_parameters(self._config.model, number), key=_place)
            self._layers[is_moe] = self._ruled(listed)
        return self._layers[is_moe]

    @cached_property
    def embedding(self) -> tuple[RuledParameter, ...]:
        """The word embedding."""
        return self._ruled([embedding_parameter(self._config.model)])

    @cached_property
    def head(self) -> tuple[RuledParameter, ...]:
        """Those after the last layer."""
        return self._ruled(head_parameters(self._config.model))

    @cached_property
    def mtp(self) -> tuple[RuledParameter, ...]:
        """Those of a layer of multi-token prediction: a decoder layer like the last, what joins features with
        the next token's embedding, norms of both and of the result, and the embedding, if no other stage's
        copy is at hand (megatron-core 0.19.2, `multi_token_prediction.py`, `gpt_model.py`)."""
        hidden = self._config.model.hidden_size
        update = self._config.optim.language_model.name
        joins = RuledParameter(2 * hidden**2, False, update, 2 * hidden**2 * (update is OptimName.muonclip))
        norm = RuledParameter(hidden, False, OptimName.adamw, 0)
        copy = self.embedding if self._config.parallelism.pp > 1 else ()
        return (*copy, norm, norm, joins, *self.layer(self._config.model.num_layers - 1), norm)

    @cached_property
    def encoder(self) -> tuple[RuledParameter, ...]:
        """Those of a decoupled encoder, of which every rank has a replica."""
        return self._vision(self._config.vision_placement.encoder_parts)

    @cached_property
    def first_stage_vision(self) -> tuple[RuledParameter, ...]:
        """Those of vision in the first stage."""
        return self._vision(self._config.vision_placement.first_stage_parts)

    def _vision(self, parts: Iterable[VisionPart]) -> tuple[RuledParameter, ...]:
        chosen = frozenset(parts)
        if not chosen:
            return ()
        listed = vision_parameters(self._config.model)
        return self._ruled(each for each in listed if VisionPart.of(each.name) in chosen)

    def _ruled(self, parameters: Iterable[TrainedParameter]) -> tuple[RuledParameter, ...]:
        return tuple(self._rule(each) for each in parameters)

    def _rule(self, each: TrainedParameter) -> RuledParameter:
        if not is_trained(each.name, self._config.optim):
            return RuledParameter(each.size, each.is_expert, None, 0)
        rule = rule_of(*each, self._config.optim, self._config.model)
        matrix_size = each.size // rule.num_matrices if rule.update is OptimName.muonclip else 0
        return RuledParameter(each.size, each.is_expert, rule.update, matrix_size)


def _place(parameter: TrainedParameter) -> int:
    places = (place for place, part in enumerate(MODULE_ORDER) if part in parameter.name)
    return next(places, len(MODULE_ORDER))
