"""The whole model against transformers' independent `kimi_k25`, same random weights, float32."""

from typing import Any

import pytest

from tests.helpers.hf_comparison import BATCHES, TOLERANCE, attention_gradients, compare
from tests.helpers.hf_reference import plain_rope
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed

MODELS: dict[str, dict[str, Any]] = {
    "compressed query": {},
    "direct query, as in Moonlight": {"q_lora_rank": None, "num_shared_experts": 2, "rope": plain_rope()},
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def comparison(request: pytest.FixtureRequest) -> dict[str, dict[str, float]]:
    return run_ranks(compare, 1, request.param)[0]


@pytest.mark.parametrize("batch", BATCHES)
def test_logits_equal_the_reference(comparison: dict[str, dict[str, float]], batch: str) -> None:
    result = comparison[batch]
    assert result["scale"] > 0.5, "logits this small would hide a difference"
    assert result["difference"] <= TOLERANCE


@pytest.mark.parametrize("batch", BATCHES)
def test_the_router_picks_the_same_experts(comparison: dict[str, dict[str, float]], batch: str) -> None:
    assert comparison[batch]["same_experts"] == 1.0


@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_attention_equal_the_reference(model: str) -> None:
    differences = run_ranks(attention_gradients, 1, MODELS[model])[0]
    is_direct = MODELS[model].get("q_lora_rank", 0) is None
    assert any("q_proj" in name for name in differences) is is_direct
    assert max(differences.values()) <= TOLERANCE, differences
