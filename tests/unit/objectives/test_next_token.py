"""Next-token prediction: what goes backward, what is divided by, and what is reported, by source."""

import torch

from k25_train.objectives.base import NamedSums, Targets, no_policy, total
from k25_train.objectives.next_token import NextToken

LOSSES = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])
NO_POLICY = no_policy(torch.device("cpu"))
TARGETS = Targets(
    loss_mask=torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]), source=torch.tensor([0, 0, 1, 1, 0]), policy=NO_POLICY
)
PLAIN = NextToken(("web", "alt_texts"), {"alt_texts"})


def named(objective: NextToken, *reported: torch.Tensor) -> NamedSums:
    sums = total(reported, len(objective.sum_names), torch.device("cpu"))
    return NamedSums.of(objective.sum_names, sums)


def test_the_sum_of_counted_losses_goes_backward() -> None:
    losses = LOSSES.clone().requires_grad_()
    output = PLAIN(losses, TARGETS)
    output.loss.backward()
    assert output.loss.item() == 29.0
    assert output.num_tokens.item() == 4
    assert output.num_tokens.dtype == torch.int32
    assert losses.grad is not None and losses.grad.tolist() == [[1.0, 0.0, 1.0, 1.0, 1.0]]
    assert not output.sums.requires_grad


def test_sums_are_named_by_source() -> None:
    sums = named(PLAIN, PLAIN(LOSSES, TARGETS).sums)
    assert sums.values == {
        "loss/web": 17.0, "tokens/web": 2.0, "loss/alt_texts": 12.0, "tokens/alt_texts": 2.0,
    }  # fmt: skip
    assert PLAIN.loss(sums) == 29.0 / 4
    assert PLAIN.figures(sums) == {
        "text_loss": 8.5, "caption_loss": 6.0, "loss/web": 8.5, "loss/alt_texts": 6.0,
    }  # fmt: skip


def test_micro_batches_add_up_and_a_silent_rank_adds_nothing() -> None:
    sums = PLAIN(LOSSES, TARGETS).sums
    assert named(PLAIN, sums, sums)["loss/web"] == 34.0
    nothing = named(PLAIN)
    assert PLAIN.loss(nothing) == 0.0
    assert PLAIN.figures(nothing) == {}


def test_text_and_captions_are_means_over_the_tokens_of_their_sources() -> None:
    objective = NextToken(("web", "code", "alt_texts", "pages", "unread"), {"alt_texts", "pages", "unread"})
    targets = Targets(loss_mask=torch.ones(5), source=torch.tensor([0, 1, 1, 2, 3]), policy=NO_POLICY)
    sums = named(objective, objective(LOSSES, targets).sums)
    assert objective.figures(sums) == {
        "text_loss": 7.0 / 3,
        "caption_loss": 12.0,
        "loss/web": 1.0,
        "loss/code": 3.0,
        "loss/alt_texts": 8.0,
        "loss/pages": 16.0,
    }
    assert objective.loss(sums) == 31.0 / 5
