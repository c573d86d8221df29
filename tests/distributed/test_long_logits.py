"""Logits of sequences of 8,192 tokens, which YaRN stretches a shrunk context to, against transformers."""

import pytest

from parallel.config import ContextExchange
from tests.helpers.hf_comparison import TOLERANCE, Batches, compare, compare_shared
from tests.helpers.long_logits import LONG, stretched
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("num_layers", "names"),
    [(2, ["text and images"]), pytest.param(4, list(LONG), marks=pytest.mark.slow)],
    ids=["2 layers", "4 layers, all batches"],
)
def test_logits_equal_transformers(num_layers: int, names: list[str]) -> None:
    batches = {name: LONG[name] for name in names}
    found = run_ranks(compare, 1, stretched(num_layers), batches, timeout_s=300.0)[0]
    for name, result in found.items():
        assert result["scale"] > 0.5, "logits this small would hide a difference"
        assert result["difference"] <= TOLERANCE, name
        assert result["same_experts"] == 1.0, name


@pytest.mark.slow
@pytest.mark.parametrize("batch", LONG)
@pytest.mark.parametrize("kind", ContextExchange)
@pytest.mark.parametrize("cp", [2, 4])
def test_logits_of_ranks_that_share_the_tokens_equal_transformers(
    cp: int, kind: ContextExchange, batch: str
) -> None:
    found = run_ranks(compare_shared, cp, stretched(3), batch, LONG, kind, timeout_s=300.0)
    assert max(found) <= TOLERANCE


def test_logits_of_fewer_tokens_do_as_well() -> None:
    """Cut into pieces as those of 8,192, with images on both ranks."""
    shorter: Batches = {"text and images": ((1400, 648), ((1, 24, 32), (1, 6, 10)))}
    (kind, _) = ContextExchange
    found = run_ranks(compare_shared, 2, stretched(2), "text and images", shorter, kind)
    assert max(found) <= TOLERANCE
