"""Saved tensors by policy: the same gradients, each tensor stored once, nothing left behind."""

import gc
import weakref
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from parallel.activations.annotate import named, recomputed, saves
from parallel.activations.copier import ThreadCopier
from parallel.activations.memory import weights_of
from parallel.activations.offload import OffloadEngine
from parallel.activations.order import Batch
from parallel.activations.policy import Policy
from parallel.activations.saving import SavingPass, Stored
from tests.helpers.saving import BATCH, CAN_REPLAY, NAMES, Block, all_of, run


@pytest.fixture(scope="module")
def engine() -> Iterator[OffloadEngine]:
    made = OffloadEngine(ThreadCopier(), 8 << 20, 1 << 20)
    yield made
    made.close()


EXACT = st.fixed_dictionaries(
    {
        name: st.sampled_from(
            [Policy.keep, Policy.offload, *([Policy.recompute] if name in CAN_REPLAY else [])]
        )
        for name in NAMES
    }
)


@settings(max_examples=60, deadline=None)
@given(policies=EXACT)
def test_exact_policies_give_the_same_bits(engine: OffloadEngine, policies: dict[str, Policy]) -> None:
    for ours, plain in zip(run(policies, engine), run(None), strict=True):
        assert torch.equal(ours, plain)
    engine.check_empty()


@pytest.mark.parametrize("policy", [Policy.fp8, Policy.fp8_offload])
def test_fp8_gradients_are_near(engine: OffloadEngine, policy: Policy) -> None:
    policies = all_of(Policy.keep, hidden=policy)
    ours, plain = run(policies, engine), run(None)
    assert torch.equal(ours[0], plain[0]), "what is stored changes no forward pass"
    for mine, exact in zip(ours[1:], plain[1:], strict=True):
        error = (mine - exact).norm() / exact.norm()
        assert error < 2**-4
    assert not all(torch.equal(mine, exact) for mine, exact in zip(ours, plain, strict=True))
    engine.check_empty()


def test_what_is_recomputed_from_fp8_is_made_of_what_fp8_gives_back(engine: OffloadEngine) -> None:
    """Recomputing from a rounded input equals a run in which the input was rounded for the backward pass."""
    rounded = run(all_of(Policy.recompute, hidden=Policy.fp8), engine)
    for mine, exact in zip(rounded, run(None), strict=True):
        assert torch.allclose(mine, exact, rtol=0.2, atol=0.2 * float(exact.abs().max()))


def test_each_tensor_is_stored_once() -> None:
    stored: list[Stored] = []
    run(all_of(Policy.fp8), observe=stored.append)
    count = Counter(each.name for each in stored if each.policy is Policy.fp8)
    # Both projections save the norm's output; silu and the product save halves of `hidden`.
    assert count == {"norm.input": 2, "norm.output": 2, "hidden": 2, "swiglu.output": 2}
    sizes = {each.name: each.device_bytes for each in stored if each.policy is Policy.fp8}
    assert sizes["norm.input"] == 128 * (64 + 4)
    assert sizes["hidden"] == 128 * (256 + 2 * 4)


def test_statistics_and_integers_are_not_rounded() -> None:
    stored: list[Stored] = []
    run(all_of(Policy.fp8), observe=stored.append)
    beside = [each for each in stored if each.name in ("norm.output", "attention") and each.shape[-1] == 1]
    assert beside
    assert all(each.policy is Policy.keep for each in beside)


def test_nothing_of_a_recomputed_call_stays_but_its_inputs() -> None:
    stored: list[Stored] = []
    run(all_of(Policy.recompute), observe=stored.append)
    held = {each.name for each in stored if each.device_bytes}
    assert held == {"norm.input", "hidden", "attention", "rest"}


def test_memory_is_free_after_the_backward_pass(engine: OffloadEngine) -> None:
    """And before it, but for what is kept."""
    saving = SavingPass(all_of(Policy.offload), BATCH, frozenset(), engine)
    x = torch.randn(128, 64, requires_grad=True)
    with saving.active():
        hidden = named("hidden", x * 2)
        memory = weakref.ref(hidden.untyped_storage())
        output = hidden.square().sum()
    del hidden, saving
    while engine.read_stats().peak_device_bytes:
        gc.collect()
    assert memory() is None
    output.backward()
    assert torch.equal(x.grad, 8 * x)
    engine.check_empty()


def test_a_pass_may_run_in_pieces(engine: OffloadEngine) -> None:
    """As in the overlapped schedule: tensors of one pass, with another pass between."""
    first = SavingPass(all_of(Policy.recompute), BATCH, frozenset(), engine)
    second = SavingPass(all_of(Policy.offload), Batch(0, 1), frozenset(), engine)
    block = Block()
    xs = [torch.randn(128, 64, requires_grad=True) for _ in range(2)]
    with first.active():
        hidden = recomputed("norm.output", lambda x: F.rms_norm(x, (64,), block.gain), xs[0])
    with second.active():
        other = block(xs[1])
    with first.active():
        hidden = hidden @ block.gate.T
    (other.sum() + hidden.square().sum()).backward()
    plain = xs[0].detach().requires_grad_()
    (F.rms_norm(plain, (64,), block.gain) @ block.gate.T).square().sum().backward()
    assert torch.equal(xs[0].grad, plain.grad)


def test_weights_are_left_alone() -> None:
    stored: list[Stored] = []
    weight = nn.Parameter(torch.randn(64, 64))
    saving = SavingPass(
        all_of(Policy.fp8), BATCH, weights_of([nn.ParameterList([weight])]), None, stored.append
    )
    with saving.active():
        named("hidden", torch.randn(4, 64)) @ weight.T
    assert [each.name for each in stored] == ["hidden"]


def test_unknown_names_and_two_names_for_one_memory() -> None:
    saving = SavingPass(all_of(Policy.keep), BATCH, frozenset(), None)
    x = torch.randn(8, 8)
    with saving.active():
        for use in (lambda: named("moe.input", x), lambda: recomputed("moe.input", torch.neg, x)):
            with pytest.raises(KeyError, match=r"moe\.input is not .* known: norm\.input, norm\.output"):
                use()
        with pytest.raises(KeyError, match="known"), saves("moe.input"):
            pass
        named("hidden", x)
        with pytest.raises(ValueError, match=r"named norm\.input lies in the memory of one named hidden"):
            named("norm.input", x[1:])


def test_a_function_that_lays_out_its_output_anew_is_found_out() -> None:
    sizes = iter([8, 16])
    saving = SavingPass(all_of(Policy.recompute), BATCH, frozenset(), None)
    x = torch.randn(8, requires_grad=True)

    def fickle(x: Tensor) -> Tensor:
        return x.expand(next(sizes), 8).clone()[:8]

    with saving.active():
        output = recomputed("norm.output", fickle, x).square().sum()
    with pytest.raises(RuntimeError, match="has to do the same each time"):
        output.backward()


@pytest.mark.parametrize("policy", [Policy.keep, Policy.offload])
def test_a_saved_tensor_that_is_changed_is_found_out(engine: OffloadEngine, policy: Policy) -> None:
    saving = SavingPass(all_of(policy), BATCH, frozenset(), engine)
    x = torch.randn(128, 64, requires_grad=True)
    with saving.active():
        hidden = named("hidden", x * 2)
        output = hidden.square().sum()
    with torch.no_grad():
        hidden.add_(1)
    with pytest.raises(RuntimeError, match=r"was changed in\s+place"):
        output.backward()
        engine.check_empty()
    del output, hidden, saving


def test_outside_of_a_pass_annotations_change_nothing() -> None:
    x = torch.randn(4, requires_grad=True)
    assert named("no name", x) is x
    with saves("no name"):
        assert recomputed("no name", torch.neg, x).grad_fn is not None
