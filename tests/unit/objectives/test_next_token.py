"""Next-token prediction: what goes backward, what is divided by, and what is reported, by kind."""

import torch

from k25_train.objectives.base import NamedSums, Targets, total
from k25_train.objectives.next_token import NextToken

LOSSES = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])
TARGETS = Targets(loss_mask=torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]), kind=torch.tensor([0, 0, 1, 1, 0]))


def named(objective: NextToken, *reported: torch.Tensor) -> NamedSums:
    sums = total(reported, len(objective.sum_names), torch.device("cpu"))
    return NamedSums.of(objective.sum_names, sums)


def test_the_sum_of_counted_losses_goes_backward() -> None:
    losses = LOSSES.clone().requires_grad_()
    output = NextToken()(losses, TARGETS)
    output.loss.backward()
    assert output.loss.item() == 29.0
    assert output.num_tokens.item() == 4
    assert output.num_tokens.dtype == torch.int32
    assert losses.grad is not None and losses.grad.tolist() == [[1.0, 0.0, 1.0, 1.0, 1.0]]
    assert not output.sums.requires_grad


def test_sums_are_named_by_kind() -> None:
    objective = NextToken()
    sums = named(objective, objective(LOSSES, TARGETS).sums)
    assert sums.values == {"text_loss": 17.0, "text_tokens": 2.0, "caption_loss": 12.0, "caption_tokens": 2.0}
    assert objective.loss(sums) == 29.0 / 4
    assert objective.figures(sums) == {"text_loss": 8.5, "caption_loss": 6.0}


def test_micro_batches_add_up_and_a_silent_rank_adds_nothing() -> None:
    objective = NextToken()
    sums = objective(LOSSES, TARGETS).sums
    assert named(objective, sums, sums)["text_loss"] == 34.0
    nothing = named(objective)
    assert objective.loss(nothing) == 0.0
    assert objective.figures(nothing) == {}


def test_any_number_of_kinds() -> None:
    objective = NextToken(("text", "caption", "ocr"))
    targets = Targets(loss_mask=torch.ones(5), kind=torch.tensor([0, 1, 1, 2, 2]))
    sums = named(objective, objective(LOSSES, targets).sums)
    assert objective.figures(sums) == {"text_loss": 1.0, "caption_loss": 3.0, "ocr_loss": 12.0}
    assert objective.loss(sums) == 31.0 / 5
