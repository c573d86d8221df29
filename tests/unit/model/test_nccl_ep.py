"""What our manager of NCCL EP changes of megatron-core's, without its kernels."""

from typing import Any

import torch
from torch import Tensor

E, K, T, D = 6, 2, 4, 3


class OnDevice:
    """A tensor of a GPU; counts how often the host asks for its values."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.copies = values, 0

    def cpu(self) -> Tensor:
        self.copies += 1
        return self.values


def manager(**fields: Any) -> Any:
    """A manager without a group and buffers."""
    from parallel.megatron.platform import use_platform

    use_platform("cpu")
    from k25_train.model.dispatcher import NcclEP

    made: Any = object.__new__(NcclEP)
    vars(made).update(num_experts=E, router_topk=K, static_shape=False, **fields)
    return made


def test_the_host_asks_once_for_the_numbers_of_rows() -> None:
    """Experts want them on the host in each of their products, in backward passes too."""
    counts = OnDevice(torch.tensor([2, 0, 1]))
    ours = manager(tokens_per_expert=counts, dispatched_probs=torch.arange(5.0))
    rows, weights = ours.get_permuted_hidden_states_by_experts(torch.randn(5, D))
    assert rows.shape == (3, D) and weights.tolist() == [0, 1, 2]
    assert ours.get_number_of_tokens_per_expert().tolist() == [2, 0, 1] and counts.copies == 1


def test_padding_goes_evenly_with_no_weight_and_no_gradient() -> None:
    probs = torch.rand(T, E).requires_grad_()
    chosen = torch.zeros(T, E, dtype=torch.bool).scatter_(1, probs.topk(K, 1).indices, True)
    chosen[1:] = False
    ours = manager()
    ours.setup_metadata(chosen, probs)
    assert set(ours.token_indices[0].tolist()) == set(chosen[0].nonzero().flatten().tolist())
    sent = ours.token_indices[1:]
    assert torch.bincount(sent.flatten(), minlength=E).tolist() == [1] * E
    assert all(len(set(row)) == K for row in sent.tolist())
    ours.token_probs.sum().backward()
    assert not ours.token_probs[1:].any() and torch.equal(probs.grad != 0, chosen)
