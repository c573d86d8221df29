"""Draws depend on seed and position alone, follow the distribution, and never give what is forbidden."""

import numpy as np
import pytest
import torch

from k25_train.rollout.engines.in_process.sampling import draw, uniforms


def ones(value: float, number: int) -> torch.Tensor:
    return torch.full((number,), value)


def test_numbers_depend_on_seed_and_position_and_on_nothing_else() -> None:
    together = uniforms([7, 7, 8], [0, 1, 0])
    assert len(set(together.tolist())) == 3
    for number, (seed, position) in enumerate([(7, 0), (7, 1), (8, 0)]):
        assert uniforms([seed], [position]).tolist() == [together[number]]
    # Written down: a run that goes on with other code draws the same.
    assert uniforms([0], [0]).tolist() == [0.6524484863740322]


def test_numbers_are_uniform_along_seeds_and_along_positions() -> None:
    number = 20_000
    for seeds, positions in ((range(number), [3] * number), ([5] * number, range(number))):
        values = uniforms(list(seeds), list(positions))
        counts = np.histogram(values, 20, (0, 1))[0]
        assert np.abs(counts - number / 20).max() < 5 * np.sqrt(number / 20)
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03
    assert 0 < uniforms([-1], [0])[0] < 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_have_the_share_of_their_probability(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    forbidden = torch.tensor([[False, False, False, True, False]])
    expected = torch.softmax((logits / temperature).masked_fill(forbidden[0], -torch.inf), -1)
    number = 20_000
    numbers = torch.from_numpy(uniforms(list(range(number)), [0] * number))
    drawn = draw(logits.expand(number, -1), ones(temperature, number), forbidden, numbers)
    shares = torch.bincount(drawn.ids, minlength=5) / number
    assert shares[3] == 0
    assert (shares - expected).abs().max() < 0.015
    # What is reported is the model's own, whatever was drawn from.
    torch.testing.assert_close(drawn.logprobs, torch.log_softmax(logits, -1)[drawn.ids])


def test_the_ends_of_the_interval_give_allowed_tokens() -> None:
    logits = torch.zeros(2, 6)
    forbidden = torch.tensor([[True, False, False, False, True, True]])
    drawn = draw(logits, ones(1.0, 2), forbidden, torch.tensor([2.0**-53, 1 - 2.0**-53]).double())
    assert drawn.ids.tolist() == [1, 3]


def test_temperature_zero_takes_the_most_probable_allowed_token() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    drawn = draw(logits, ones(0.0, 1), torch.tensor([[False, True, False]]), torch.tensor([0.999]).double())
    assert drawn.ids.tolist() == [2]
    assert drawn.logprobs.item() == pytest.approx(
        torch.log_softmax(torch.tensor([1.0, 3.0, 2.0]), 0)[2].item()
    )


def test_low_temperatures_of_improbable_tokens_do_not_underflow() -> None:
    logits = torch.tensor([[100.0, 0.0, -1.0]])
    forbidden = torch.tensor([[True, False, False]])
    drawn = draw(logits, ones(0.01, 1), forbidden, torch.tensor([0.5]).double())
    assert drawn.ids.tolist() == [1]


def test_a_distribution_without_sense_has_no_logprob() -> None:
    drawn = draw(
        torch.tensor([[torch.nan, 0.0]]), ones(1.0, 1), torch.zeros(1, 2).bool(), torch.tensor([0.5])
    )
    assert drawn.logprobs.isnan().all()
