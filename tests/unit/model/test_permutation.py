"""Rows sorted by expert and added up again: as megatron-core does it, but in float32 and in a fixed order."""

import functools

import pytest
import torch
from torch import Tensor

from k25_train.model.permutation import Routes, order_by_expert, reorder, rows_of_experts, sums_of_tokens

T, E, K, D = 96, 12, 8, 40


def choose(num_padding: int = 0, seed: int = 0) -> Tensor:
    """A map [T, E] with K experts of each token, and none of the last ones, which are padding."""
    scores = torch.rand(T, E, generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(T, E, dtype=torch.bool).scatter_(1, scores.topk(K, 1).indices, True)
    chosen[T - num_padding :] = False
    return chosen


def routes_of(chosen: Tensor) -> Routes:
    return Routes.of(chosen, int(chosen.sum()))


@pytest.mark.parametrize("num_padding", [0, 7, T])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_indexing(num_padding: int, dtype: torch.dtype) -> None:
    chosen = choose(num_padding)
    experts, tokens_of = chosen.T.nonzero().unbind(1)
    tokens = torch.randn(T, D, dtype=dtype, requires_grad=True)
    probs = torch.rand(T, E, requires_grad=True)
    routes = routes_of(chosen)
    rows, weights = rows_of_experts(tokens, probs, routes)
    sums = sums_of_tokens(rows.square() * weights[:, None], routes)
    plain_rows, plain_weights = tokens[tokens_of], probs[tokens_of, experts]
    plain = torch.zeros(T, D, dtype=sums.dtype).index_add(
        0, tokens_of, plain_rows.square() * plain_weights[:, None]
    )
    assert torch.equal(rows, plain_rows) and torch.equal(weights, plain_weights)
    torch.testing.assert_close(sums, plain)
    gradient = torch.randn_like(sums)
    ours = torch.autograd.grad(sums, [tokens, probs], gradient)
    torch.testing.assert_close(ours, torch.autograd.grad(plain, [tokens, probs], gradient))


def test_eight_rows_are_added_in_float32_and_rounded_once() -> None:
    """Both ways: the outputs of a token's experts, and the gradients of its copies."""
    routes = routes_of(choose())
    rows = torch.randn(T * K, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    tokens_of = routes.pairs // E
    exact = torch.zeros(T, 512, dtype=torch.float64).index_add_(0, tokens_of, rows.double())
    # [expert of a token, in ascending order][token]
    copies = rows[routes.rows].view(T, K, 512).unbind(1)
    in_bfloat16 = functools.reduce(torch.add, copies)
    in_float32 = functools.reduce(torch.add, [each.float() for each in copies])

    def error(sums: Tensor) -> float:
        return ((sums.double() - exact).norm() / exact.norm()).item()

    tokens = torch.zeros(T, 512, dtype=torch.bfloat16, requires_grad=True)
    sent, _ = rows_of_experts(tokens, torch.zeros(T, E), routes)
    (of_tokens,) = torch.autograd.grad(sent, tokens, rows)
    assert torch.equal(sums_of_tokens(rows, routes), in_float32.bfloat16())
    assert torch.equal(of_tokens, in_float32.bfloat16())
    # One rounding to 8 bits is 1.7e-3; one after each row is what atomic operations on CUDA would make of it.
    assert error(of_tokens) < 1.8e-3 < 3.3e-3 < error(in_bfloat16)


def test_what_is_kept_are_the_pairs_that_are_sent() -> None:
    """A slice of the sorted list of all pairs would keep that list: 12.6 MB a layer of the released model."""
    kept: list[Tensor] = []
    tokens = torch.randn(T, D, requires_grad=True)
    routes = routes_of(choose())
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        rows, _ = rows_of_experts(tokens, torch.rand(T, E, requires_grad=True), routes)
        sums_of_tokens(rows, routes)
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in kept}
    assert sum(storages.values()) == 8 * (2 * T * K + T)


def test_received_rows_are_sorted_and_put_back() -> None:
    sizes = torch.tensor([[2, 0, 3], [1, 4, 0], [0, 0, 2], [5, 1, 1]])
    experts = torch.arange(3).repeat(4).repeat_interleave(sizes.flatten())
    order, inverse = order_by_expert(sizes, len(experts))
    rows = torch.randn(len(experts), 5, requires_grad=True)
    ours, weights = reorder(order, inverse, rows, experts.float())
    assert torch.equal(weights, experts.sort(stable=True).values.float())
    assert torch.equal(ours, rows[experts.sort(stable=True).indices])
    (back,) = reorder(inverse, order, ours)
    assert torch.equal(back, rows)
    gradient = torch.randn_like(rows)
    assert torch.equal(torch.autograd.grad(ours, rows, gradient)[0], gradient[inverse])
