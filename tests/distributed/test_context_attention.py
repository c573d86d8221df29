"""Ranks that share a micro-batch attend as one rank that has it all."""

import pytest

from parallel.config import ContextExchange
from tests.helpers.context_ranks import Compared, Documents, compare, gradient_of_one_ranks_input
from tests.helpers.hf_reference import tiny_model_config
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed

KINDS = tuple(ContextExchange)
CASES = {
    "uneven": Documents((20, 1, 33, 10)),
    "one over all ranks": Documents((256,)),
    "shorter than there are ranks": Documents((1,) * 64),
    "padding between": Documents((3, 20, 4, 1, 29, 7), padding=(0, 2, 5)),
    "a rank of padding": Documents((30, 34), padding=(1,)),
    "padding alone": Documents((30, 34), padding=(0, 1)),
    "a long one and short ones": Documents((5, 150, 40, 20, 41), padding=(4,)),
}
BOUND = 1e-6
GRADIENT_BOUND = 3e-6
"""Gradients pass through more sums, which cancel, in another order."""


def assert_near(found: Compared, what: object) -> None:
    assert found.output < BOUND, what
    assert found.of_hidden < GRADIENT_BOUND, what
    assert max(found.of_weights.values()) < GRADIENT_BOUND, (what, found.of_weights)
    assert found.max_logits < 1e-5, what


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_outputs_and_gradients_are_those_of_one_rank(num_ranks: int) -> None:
    by_rank = run_ranks(compare, num_ranks, list(CASES.values()), KINDS)
    for rank, found in enumerate(by_rank):
        names = [(rank, kind, name) for kind in KINDS for name in CASES]
        for what, each in zip(names, found, strict=True):
            assert_near(each, what)


@pytest.mark.parametrize("kernel", ["float32", "varlen", "transformer_engine"])
def test_kernels_for_cuda_attend_alike(kernel: str) -> None:
    for rank, found in enumerate(run_ranks(compare, 2, list(CASES.values()), KINDS, kernel)):
        names = [(rank, kind, name) for kind in KINDS for name in CASES]
        for what, each in zip(names, found, strict=True):
            assert_near(each, what)


def test_queries_that_are_not_compressed() -> None:
    for found in run_ranks(compare, 2, [CASES["uneven"]], KINDS, "cpu", {"q_lora_rank": None}):
        for each in found:
            assert_near(each, "direct queries")


def test_latents_alone_travel() -> None:
    """Forward once, backward once more with their gradients, all to each other rank or around the ring."""
    model = tiny_model_config()
    width = model.kv_lora_rank + model.qk_rope_head_dim
    for num_ranks in (2, 4):
        cases = [CASES["uneven"], CASES["padding alone"]]
        for found in run_ranks(compare, num_ranks, cases, KINDS):
            tokens = 64 // num_ranks
            assert {each.sent_bytes for each in found} == {(num_ranks - 1) * tokens * width * 4 * 3}


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_go_backward_together_where_one_alone_needs_a_gradient(kind: ContextExchange) -> None:
    """As where all but the tower is frozen, and one rank has the image."""
    first, second = run_ranks(gradient_of_one_ranks_input, 2, kind)
    assert first == 0 and second > 0
