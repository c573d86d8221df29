"""Weight gradients that are put off are those that autograd computes."""

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.ranks import RankContext, run_ranks

pytestmark = pytest.mark.distributed


def linear_gradients(_context: RankContext, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """(put off, autograd's) gradients of input and weight of a linear layer, twice used."""
    from parallel.megatron.deferred_wgrad import defer_wgrads, linear_deferring_wgrad

    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(24, 16, generator=generator).to(dtype))
    inputs = torch.randn(10, 1, 16, generator=generator).to(dtype).requires_grad_()
    weighting = torch.randn(10, 1, 24, generator=generator).to(dtype)

    (2 * nn.functional.linear(inputs, weight) * weighting).sum().backward()
    expected = (inputs.grad, weight.grad)
    inputs.grad = weight.grad = None

    events: list[str] = []
    wgrads = defer_wgrads(nn.Identity(), weight)
    wgrads.when_accumulated.append(lambda: events.append("accumulated"))
    for _ in range(2):
        (linear_deferring_wgrad(inputs, weight, wgrads) * weighting).sum().backward()
    assert weight.grad is None, "the gradient came with backward"
    assert len(wgrads.pending) == 2
    assert events == []
    wgrads.compute()
    assert not wgrads.pending
    assert events == ["accumulated"]
    assert expected[0] is not None and expected[1] is not None
    return {"input": (inputs.grad, expected[0]), "weight": (weight.grad, expected[1])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_linear_layer(dtype: torch.dtype) -> None:
    for found, expected in run_ranks(linear_gradients, 1, dtype)[0].values():
        assert torch.equal(found, expected)


def grouped_gradients(_context: RankContext, counts: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """(put off, autograd's) gradients of rows and matrices of a grouped product."""
    from k25_train.model.experts import grouped_linear
    from parallel.megatron.deferred_wgrad import defer_wgrads, grouped_linear_deferring_wgrad

    generator = torch.Generator().manual_seed(1)
    weights = nn.Parameter(torch.randn(len(counts), 24, 16, generator=generator))
    rows = torch.randn(sum(counts), 16, generator=generator, requires_grad=True)
    weighting = torch.randn(sum(counts), 24, generator=generator)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)

    (grouped_linear(rows, weights, ends) * weighting).sum().backward()
    expected = (rows.grad, weights.grad)
    rows.grad = weights.grad = None

    wgrads = defer_wgrads(nn.Identity(), weights)
    (grouped_linear_deferring_wgrad(rows, weights, ends, wgrads) * weighting).sum().backward()
    assert weights.grad is None
    wgrads.compute()
    assert expected[0] is not None and expected[1] is not None
    return {"rows": (rows.grad, expected[0]), "weights": (weights.grad, expected[1])}


@pytest.mark.parametrize("counts", [[3, 9, 1, 7], [0, 20, 0, 0]], ids=["all busy", "some empty"])
def test_a_grouped_product(counts: list[int]) -> None:
    for found, expected in run_ranks(grouped_gradients, 1, counts)[0].values():
        assert torch.equal(found, expected)
