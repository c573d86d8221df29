"""What FP8 storage does to gradients: how far they are from exact ones, weight by weight."""

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import RankContext, run_ranks

pytestmark = pytest.mark.distributed

BOUND = 2**-4
"""Of the norm of a weight's gradient: E4M3 rounds a number by at most 2^-4 of it, and by less on average, so
that products of several rounded numbers are within it."""


def gradients(context: RankContext, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """Policies -> name -> gradient of the tiny model with random weights."""
    from k25_train.compose.resolve import compose
    from parallel.activations.manager import ActivationManager
    from parallel.activations.order import OffloadOrder
    from parallel.pipeline.schedule import PassKey
    from tests.helpers.tiny_model import build_random_model, documents, random_tokens

    model = build_random_model(context, hidden_size=128, expert_ffn_hidden_size=64).to(dtype)
    tokens = random_tokens(64)

    def of(*overrides: str) -> dict[str, Tensor]:
        policies = compose(["experiment=smoke", *overrides]).activation.policies()
        manager = ActivationManager(policies, [model], OffloadOrder(frozenset(), {}), None)
        model.zero_grad()
        with manager.forward_pass(PassKey(0, 0)).active():
            losses = model(
                tokens=tokens,
                documents=documents(),
                labels=tokens,
                media_positions=torch.empty(0, dtype=torch.long),
            )
        losses.sum().backward()
        named = ((name, weight.grad) for name, weight in model.named_parameters())
        return {name: gradient.float() for name, gradient in named if gradient is not None}

    return {
        "keep": of("activation=keep"),
        "k2": of("activation=k2"),
        "up_input": of("activation=keep", "activation.moe.up_input=fp8"),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_with_k2_are_within_the_bound(dtype: torch.dtype) -> None:
    (found,) = run_ranks(gradients, 1, dtype)
    exact, rounded = found["keep"], found["k2"]
    assert exact.keys() == rounded.keys()
    errors = {
        name: float((rounded[name] - exact[name]).norm() / exact[name].norm())
        for name in exact
        if exact[name].any()
    }
    assert max(errors.values()) < BOUND, sorted(errors.items(), key=lambda each: -each[1])[:5]
    # The last layer's output projection and the head read nothing that was rounded on the way back.
    assert errors["language_model.output_layer.weight"] == 0
    assert max(errors.values()) > BOUND / 8, "something was rounded"


def test_the_up_projections_input_is_in_no_other_gradient() -> None:
    (found,) = run_ranks(gradients, 1, torch.float32)
    changed = {
        name for name, exact in found["keep"].items() if not torch.equal(exact, found["up_input"][name])
    }
    assert changed == {name for name in found["keep"] if name.endswith("experts.gate_up_proj")}
