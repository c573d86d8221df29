"""Saved tensors by policy: the same gradients, each tensor stored once, nothing left behind."""

import gc
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from parallel.activations.annotate import named, recomputed, saves
from parallel.activations.fp8 import compress, decompress
from parallel.activations.offload import OffloadEngine
from parallel.activations.packed import Restorable
from parallel.activations.policy import Policy
from parallel.activations.saving_pass import SaveRecord, SavingPass
from parallel.activations.storage import weights_of
from parallel.activations.ticket import Ticket
from parallel.host.copier import ThreadCopier
from parallel.pipeline.schedule import PassKey
from tests.helpers.saving_pass_blocks import CAN_REPLAY, KEY, NAMES, Block, all_of, run, swiglu


@pytest.fixture(scope="module")
def engine() -> Iterator[OffloadEngine]:
    made = OffloadEngine(ThreadCopier(), 8 << 20, 1 << 20)
    yield made
    made.close()


def wait_until_freed(storage: "weakref.ref[torch.UntypedStorage]", engine: OffloadEngine) -> None:
    """Return once the storage has been copied to the host and freed."""
    deadline = time.monotonic() + 20
    while storage() is not None and time.monotonic() < deadline:
        engine.read_stats()
        gc.collect()
    assert storage() is None


EXACT = st.fixed_dictionaries(
    {
        name: st.sampled_from(
            [Policy.keep, Policy.offload, *([Policy.recompute] if name in CAN_REPLAY else [])]
        )
        for name in NAMES
    }
)


@settings(max_examples=25, deadline=None)
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


def test_what_is_recomputed_from_fp8_is_made_of_what_fp8_gives_back() -> None:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(64, 256, generator=generator, requires_grad=True)
    scale, weight = torch.rand(64, 1, generator=generator), torch.randn(64, 128, requires_grad=True)
    saving = SavingPass(all_of(Policy.recompute, hidden=Policy.fp8), KEY, frozenset(), None)
    with saving.active():
        product = recomputed("swiglu.output", swiglu, named("hidden", hidden * 1), scale) @ weight.T
    product.sum().backward()
    stored = decompress(compress(hidden.detach())).requires_grad_()
    (swiglu(stored, scale) @ weight.detach().T).sum().backward()
    assert torch.equal(weight.grad, torch.ones(64, 64).T @ swiglu(stored.detach(), scale))
    assert torch.equal(hidden.grad, stored.grad)
    assert not torch.equal(stored, hidden)


def test_each_tensor_is_stored_once() -> None:
    stored: list[SaveRecord] = []
    run(all_of(Policy.fp8), observe=stored.append)
    count = Counter(each.name for each in stored if each.policy is Policy.fp8)
    # Both projections save the norm's output; silu and the product save halves of `hidden`.
    assert count == {"norm.input": 2, "norm.output": 2, "hidden": 2, "swiglu.output": 2}
    sizes = {each.name: each.device_bytes for each in stored if each.policy is Policy.fp8}
    assert sizes["norm.input"] == 128 * (64 + 4)
    assert sizes["hidden"] == 128 * (256 + 2 * 4)


def test_statistics_and_integers_are_not_rounded() -> None:
    stored: list[SaveRecord] = []
    run(all_of(Policy.fp8), observe=stored.append)
    exact = [each for each in stored if each.name in ("norm.output", "attention") and each.shape[-1] == 1]
    assert exact
    assert all(each.policy is Policy.keep for each in exact)


def test_nothing_of_a_recomputed_call_stays_but_its_inputs() -> None:
    stored: list[SaveRecord] = []
    run(all_of(Policy.recompute), observe=stored.append)
    held = {each.name for each in stored if each.device_bytes}
    assert held == {"norm.input", "hidden", "attention", "rest"}


def test_memory_is_free_after_the_backward_pass(engine: OffloadEngine) -> None:
    """And before it, but for what is kept."""
    saving = SavingPass(all_of(Policy.offload), KEY, frozenset(), engine)
    x = torch.randn(128, 64, requires_grad=True)
    with saving.active():
        hidden = named("hidden", x * 2)
        memory = weakref.ref(hidden.untyped_storage())
        output = hidden.square().sum()
    del hidden, saving
    wait_until_freed(memory, engine)
    output.backward()
    assert torch.equal(x.grad, 8 * x)
    engine.check_empty()


def test_a_pass_may_run_in_pieces(engine: OffloadEngine) -> None:
    """As in the overlapped schedule: tensors of one pass, with another pass between."""
    first = SavingPass(all_of(Policy.recompute), KEY, frozenset(), engine)
    second = SavingPass(all_of(Policy.offload), PassKey(0, 1), frozenset(), engine)
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


def test_a_graph_that_is_held_holds_nothing_after_its_backward_pass(engine: OffloadEngine) -> None:
    """As token dispatchers hold their last probabilities."""
    policies = all_of(Policy.recompute) | {"norm.input": Policy.offload}
    saving = SavingPass(policies, KEY, frozenset(), engine)
    x = torch.randn(128, 64, requires_grad=True)
    with saving.active():
        output = recomputed(
            "norm.output", lambda x: F.rms_norm(x, (64,)), named("norm.input", x * 2)
        ).square()
    del saving
    output.sum().backward()
    engine.check_empty()
    assert not [
        each for each in gc.get_objects() if Restorable in type(each).__mro__ and each._tensor is not None
    ]
    with pytest.raises(RuntimeError):
        output.sum().backward()


def test_outputs_are_freed_before_the_recomputed_functions_backward() -> None:
    """What made them needs their history only; several of them may be large."""
    memory: list[weakref.ref[torch.UntypedStorage]] = []
    seen: list[bool] = []

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            output = x * 2
            memory.append(weakref.ref(output.untyped_storage()))
            return output

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            seen.append(memory[-1]() is None)
            return gradient * 2

    saving = SavingPass(all_of(Policy.recompute), KEY, frozenset(), None)
    x = torch.randn(8, 8, requires_grad=True)
    with saving.active():
        output = recomputed("norm.output", Noting.apply, named("norm.input", x * 1)).square()
    output.sum().backward()
    assert seen == [True]
    assert len(memory) == 2, "made once, and once again"
    assert torch.allclose(x.grad, 8 * x)


def test_a_tensor_is_restored_once_for_all_who_need_it(
    engine: OffloadEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_loads = 0
    load = engine.load

    def counted(ticket: Ticket) -> Tensor:
        nonlocal num_loads
        num_loads += 1
        return load(ticket)

    monkeypatch.setattr(engine, "load", counted)
    saving = SavingPass(all_of(Policy.offload), KEY, frozenset(), engine)
    x = torch.randn(128, 64, requires_grad=True)
    with saving.active():
        hidden = named("hidden", x * 1)
        output = hidden.square().sum() + hidden.pow(3).sum() + hidden[:64].pow(2).sum()
    del saving, hidden
    output.backward()
    assert num_loads == 1
    engine.check_empty()


@pytest.mark.parametrize("policy", [Policy.fp8, Policy.fp8_offload, Policy.offload])
def test_tensors_with_permuted_strides_and_views_of_them(engine: OffloadEngine, policy: Policy) -> None:
    def gradients(saving: SavingPass | None) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 128, generator=torch.Generator().manual_seed(5)).requires_grad_()
        left, right = torch.ones(64, 128, requires_grad=True), torch.ones(64, 64, requires_grad=True)
        with nullcontext() if saving is None else saving.active():
            turned = named("hidden", (2 * x).t())
            output = (turned @ right).square().sum() + (turned.t() * left).square().sum()
        output.backward()
        assert right.grad is not None
        assert left.grad is not None
        return right.grad, left.grad

    saving = SavingPass(all_of(Policy.keep, hidden=policy), KEY, frozenset(), engine)
    for ours, plain in zip(gradients(saving), gradients(None), strict=True):
        assert (ours - plain).norm() <= 2**-4 * plain.norm()
    del saving
    engine.check_empty()


def test_parts_of_a_memory_without_a_name_are_told_apart(engine: OffloadEngine) -> None:
    saving = SavingPass(all_of(Policy.offload), KEY, frozenset(), engine)
    x = torch.randn(2, 64, 64, requires_grad=True)
    with saving.active():
        both = x * 1
        output = both[0].square().sum() + both[1].pow(3).sum()
    memory = weakref.ref(both.untyped_storage())
    del saving, both
    wait_until_freed(memory, engine)
    output.backward()
    assert torch.allclose(x.grad[0], 2 * x[0])
    assert torch.allclose(x.grad[1], 3 * x[1] ** 2)
    engine.check_empty()


def test_other_views_of_what_is_made_again_are_kept() -> None:
    saving = SavingPass(all_of(Policy.recompute), KEY, frozenset(), None)
    x = torch.randn(8, 8, dtype=torch.complex64, requires_grad=True)
    w = torch.randn(8, 8, dtype=torch.complex64, requires_grad=True)
    with saving.active():
        made = recomputed("norm.output", torch.exp, named("norm.input", x * 1))
        output = torch.view_as_real(made.conj() * w).sum() + torch.view_as_real(made).square().sum()
    output.backward()
    plain = w.detach().clone().requires_grad_()
    torch.view_as_real(x.detach().exp().conj() * plain).sum().backward()
    assert torch.allclose(w.grad, plain.grad)


def test_what_outlives_its_call_is_kept() -> None:
    saving = SavingPass(all_of(Policy.recompute), KEY, frozenset(), None)
    x, w = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    with saving.active():
        with torch.no_grad():
            without_graph = recomputed("norm.output", torch.neg, named("norm.input", x * 1))
        detached = recomputed("norm.output", torch.neg, named("norm.input", x * 2)).detach()
        output = (without_graph * w + detached * w).sum()
    output.backward()
    assert torch.allclose(w.grad, -3 * x)


def test_weights_are_left_alone() -> None:
    stored: list[SaveRecord] = []
    weight = nn.Parameter(torch.randn(64, 64))
    saving = SavingPass(
        all_of(Policy.fp8), KEY, weights_of([nn.ParameterList([weight])]), None, stored.append
    )
    with saving.active():
        named("hidden", torch.randn(4, 64)) @ weight.T
    assert [each.name for each in stored] == ["hidden"]


def test_unknown_names_and_two_names_for_one_memory() -> None:
    saving = SavingPass(all_of(Policy.keep), KEY, frozenset(), None)
    x = torch.randn(8, 8)
    with saving.active():
        for use in (lambda: named("moe.input", x), lambda: recomputed("moe.input", torch.neg, x)):
            with pytest.raises(KeyError, match=r"moe\.input is not .* known: norm\.input, norm\.output"):
                use()
        with pytest.raises(KeyError, match="known"), saves("moe.input"):
            pass
        named("hidden", x)
        with pytest.raises(ValueError, match=r"named norm\.input shares the storage of one named hidden"):
            named("norm.input", x[1:])


def test_a_function_that_lays_out_its_output_anew_is_found_out() -> None:
    sizes = iter([8, 16])
    saving = SavingPass(all_of(Policy.recompute), KEY, frozenset(), None)
    x = torch.randn(8, requires_grad=True)

    def fickle(x: Tensor) -> Tensor:
        return x.expand(next(sizes), 8).clone()[:8]

    with saving.active():
        output = recomputed("norm.output", fickle, x).square().sum()
    with pytest.raises(RuntimeError, match="must do the same each time"):
        output.backward()


@pytest.mark.parametrize("policy", [Policy.keep, Policy.offload])
def test_a_saved_tensor_that_is_changed_is_found_out(engine: OffloadEngine, policy: Policy) -> None:
    saving = SavingPass(all_of(policy), KEY, frozenset(), engine)
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
