"""The whole model against transformers' independent `kimi_k25`, same random weights, float32."""

import pytest

from tests.helpers.hf_comparison import BATCHES, TOLERANCE, compare
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def comparison() -> dict[str, dict[str, float]]:
    return run_ranks(compare, 1)[0]


@pytest.mark.parametrize("batch", BATCHES)
def test_logits_equal_the_reference(comparison: dict[str, dict[str, float]], batch: str) -> None:
    result = comparison[batch]
    assert result["scale"] > 0.5, "logits this small would hide a difference"
    assert result["difference"] <= TOLERANCE


@pytest.mark.parametrize("batch", BATCHES)
def test_the_router_picks_the_same_experts(comparison: dict[str, dict[str, float]], batch: str) -> None:
    assert comparison[batch]["same_experts"] == 1.0
