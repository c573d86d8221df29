"""Moonlight-16B-A3B, whose queries are projected directly, against what was published of it."""

from dataclasses import replace

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.model import ModelConfig
from k25_train.errors import ConfigError
from k25_train.parameters.megatron import iterate_parameters
from k25_train.parameters.released import count_parameters, iterate_tensors
from k25_train.parameters.table import EMBEDDING, OUTPUT_HEAD
from k25_train.parameters.update_rules import rule_of
from k25_train.plan.flops import attention_multiply_adds
from tests.helpers.forward_flops import token_multiply_adds

NUM_TENSORS = 5344 - 27
"""NVIDIA Megatron-Bridge counted 5,344 tensors in the release (card of moonlight-16b-a3b, 2026-07-19), 27 of
which are tables of rotary frequencies that nothing reads."""


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return compose(["experiment=smoke", "model=moonlight_16b"]).model


def test_the_language_model_has_the_published_size(model: ModelConfig) -> None:
    count = count_parameters(model)
    assert count.total - count.vision == 15_960_108_544
    words = sum(each.active for each in count.modules if each.module in (EMBEDDING, OUTPUT_HEAD))
    # Moonlight's report counts without word embeddings: 15.29B parameters, 2.24B of which a token activates.
    assert count.total - count.vision - words == pytest.approx(15.29e9, rel=1e-3)
    assert count.active - words == pytest.approx(2.24e9, rel=2e-3)


def test_it_has_as_many_tensors_as_the_release(model: ModelConfig) -> None:
    names = [each.name for each in iterate_tensors(model) if each.name.startswith("language_model.")]
    assert len(names) == NUM_TENSORS
    assert len(set(names)) == NUM_TENSORS


def test_queries_are_one_matrix_for_muon_or_one_per_head(model: ModelConfig) -> None:
    optim = compose(["experiment=smoke"]).optim
    name = "language_model.decoder.layers.3.self_attention.linear_q_proj.weight"
    [query] = [each for each in iterate_parameters(model) if each.name == name]
    assert query.shape == (16 * 192, 2048)
    assert rule_of(*query, optim, model).num_matrices == 1
    per_head = replace(optim, muon=replace(optim.muon, per_head=True))
    assert rule_of(*query, per_head, model).num_matrices == 16


def test_flops_are_those_of_one_projection(model: ModelConfig) -> None:
    key_value = 2048 * (512 + 64) + 512 * 16 * (128 + 128)
    expected = 2048 * 16 * 192 + key_value + 16 * 128 * 2048
    assert attention_multiply_adds(model) == expected
    compressed = replace(model, q_lora_rank=1536)
    more = 2048 * 1536 + 1536 * 16 * 192 - 2048 * 16 * 192
    assert token_multiply_adds(compressed) - token_multiply_adds(model) == 27 * more


def test_a_width_of_zero_is_not_the_same_as_none() -> None:
    with pytest.raises(ConfigError, match="must be positive, or null to project queries directly"):
        compose(["experiment=smoke", "model.q_lora_rank=0"])
    assert not compose(["experiment=smoke", "model.q_lora_rank=null"]).model.compresses_query
