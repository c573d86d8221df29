"""Weight gradients added to float32 by the product itself, at once or later, by torch and Transformer Engine.

They are autograd's where data parallelism keeps none, and more exact than rounded ones where it does."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.ranks import RankContext, run_ranks

pytestmark = pytest.mark.distributed

COUNTS = {"all busy": [3, 9, 1, 7], "some empty": [0, 20, 0, 0], "no rows": [0, 0, 0, 0]}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear_gradients(_context: RankContext, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """(put off, autograd's) gradients of input and weight of a linear layer, twice used."""
    from parallel.megatron.wgrad import linear, own_weight_gradients

    weight = nn.Parameter(draw(24, 16, dtype=dtype))
    inputs = draw(10, 1, 16, dtype=dtype, seed=2).requires_grad_()
    weighting = draw(10, 1, 24, dtype=dtype, seed=3)

    for _ in range(2):
        (nn.functional.linear(inputs, weight) * weighting).sum().backward()
    expected = (inputs.grad, weight.grad)
    inputs.grad = weight.grad = None

    events: list[str] = []
    wgrads = own_weight_gradients(nn.Identity(), weight, later=True)
    wgrads.when_accumulated.append(lambda: events.append("accumulated"))
    for _ in range(2):
        (linear(inputs, weight, wgrads) * weighting).sum().backward()
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


def embedding_gradients(_context: RankContext, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """(found, expected) gradients of an embedding's rows of two passes, and the largest new tensor's rows."""
    from parallel.megatron.wgrad import embedding, own_weight_gradients

    weight = nn.Parameter(draw(50, 16, dtype=dtype))
    ids = torch.tensor([[3, 7, 3, 3, 49, 0]])
    weighting = draw(1, 6, 16, dtype=dtype, seed=3)
    exact = weight.detach().double().requires_grad_()
    (nn.functional.embedding(ids, exact) * weighting.double()).sum().backward()
    assert exact.grad is not None

    total, events = add_up(
        weight, lambda wgrads: embedding(ids, weight, wgrads).backward(weighting), later=False
    )
    assert events == ["complete True", "backward"] * 2
    del weight.main_grad
    wgrads = own_weight_gradients(nn.Identity(), weight, later=False)
    (alone,) = torch.autograd.grad(embedding(ids, weight, wgrads), weight, weighting)
    output = embedding(ids, weight, wgrads).detach()
    return {
        "output": (output, nn.functional.embedding(ids, weight).detach()),
        "main_grad": (total.double(), 2 * exact.grad),
        "alone": (alone, exact.grad.to(dtype)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_embedding(dtype: torch.dtype) -> None:
    for found, expected in run_ranks(embedding_gradients, 1, dtype)[0].values():
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def add_up(weights: nn.Parameter, run: Any, *, later: bool) -> tuple[Tensor, list[str]]:
    """The sum in `main_grad` of two backward passes of `run`, and when data parallelism's hook was called."""
    from parallel.megatron.wgrad import own_weight_gradients

    weights.main_grad = torch.zeros_like(weights, dtype=torch.float32)  # type: ignore[attr-defined]
    wgrads = own_weight_gradients(nn.Identity(), weights, later=later)
    events: list[str] = []

    def hook() -> None:
        # As `DistributedDataParallel` does it.
        assert weights.grad is not None and weights.grad_added_to_main_grad  # type: ignore[attr-defined]
        weights.grad = None
        events.append(f"complete {weights.main_grad.count_nonzero() > 0}")  # type: ignore[attr-defined]

    wgrads.when_accumulated.append(hook)
    for _ in range(2):
        run(wgrads)
        events.append("backward")
        wgrads.compute()
    assert weights.grad is None
    return weights.main_grad, events  # type: ignore[return-value]


def grouped_gradients(
    _context: RankContext, counts: list[int], dtype: torch.dtype
) -> dict[str, tuple[Tensor, Tensor]]:
    """(found, autograd's) gradients of rows and matrices of a grouped product, and its output."""
    import torch.nn.functional as F

    from k25_train.model.grouped_gemm import grouped_gemm, grouped_linear
    from parallel.megatron.wgrad import own_weight_gradients
    from tests.helpers import te_grouped_gemm

    te_grouped_gemm.install()
    weights = nn.Parameter(draw(len(counts), 24, 16, dtype=dtype))
    rows = draw(sum(counts), 16, dtype=dtype, seed=2).requires_grad_()
    # Transposed in memory, as a gradient may be.
    weighting = draw(24, sum(counts), dtype=dtype, seed=3).T
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)

    # 1. Autograd's, of operands as exact as float64.
    exact_weights = weights.detach().double().requires_grad_()
    split = zip(rows.detach().double().split(counts), exact_weights, strict=True)
    torch.cat([part @ matrix.T for part, matrix in split]).backward(weighting.double())
    output, of_rows = rows.new_empty(0, 24), torch.zeros_like(rows)
    if sum(counts):
        output = F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
        (of_rows,) = torch.autograd.grad(output, rows, weighting.contiguous())
    found = {}
    for transformer_engine in (False, True):
        gemm = grouped_gemm(transformer_engine=transformer_engine, dtype=dtype)
        name = type(gemm).__name__
        groups = gemm.groups(torch.tensor(counts), rows.device)

        # 2. Ours, at once and later, into float32.
        def run(wgrads: Any, gemm: Any = gemm, groups: Any = groups, name: str = name) -> None:
            rows.grad = None
            ours = grouped_linear(rows, weights, groups, gemm, wgrads, computed=weights)
            ours.backward(weighting)
            found[f"{name} output"] = ours.detach(), output.detach()
            found[f"{name} rows"] = rows.grad, of_rows

        at_once, events = add_up(weights, run, later=False)
        later, events_later = add_up(weights, run, later=True)
        found[f"{name} later"] = later, at_once
        has_gradient = sum(counts) > 0
        assert events == [f"complete {has_gradient}", "backward"] * 2
        assert events_later == ["backward", f"complete {has_gradient}"] * 2
        found[f"{name} weights"] = at_once.double(), 2 * exact_weights.grad
        # 3. Without data parallelism.
        del weights.main_grad
        wgrads = own_weight_gradients(nn.Identity(), weights, later=False)
        (alone,) = torch.autograd.grad(
            grouped_linear(rows, weights, groups, gemm, wgrads, computed=weights), weights, weighting
        )
        assert alone.dtype is dtype
        found[f"{name} alone"] = alone, (at_once / 2).to(dtype)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=list(COUNTS))
def test_a_grouped_product(counts: list[int], dtype: torch.dtype) -> None:
    results = run_ranks(grouped_gradients, 1, counts, dtype)[0]
    assert len(results) == (5 if dtype is torch.float32 else 10), "float32 is torch's in any case"
    for name, (found, expected) in results.items():
        if name.endswith("weights"):
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-5)
        else:
            assert torch.equal(found, expected), name


def transformer_engine_calls(_context: RankContext) -> tuple[list[Any], list[int], list[int]]:
    """The calls of two passes of one grouped layer, where `main_grad` of each expert is, and the counts."""
    from k25_train.model.grouped_gemm import grouped_gemm, grouped_linear
    from tests.helpers import te_grouped_gemm

    te_grouped_gemm.install()
    counts = COUNTS["all busy"]
    weights = nn.Parameter(draw(4, 24, 16, dtype=torch.bfloat16))
    gemm = grouped_gemm(transformer_engine=True, dtype=torch.bfloat16)
    groups = gemm.groups(torch.tensor(counts), weights.device)

    def run(wgrads: Any) -> None:
        rows = draw(20, 16, dtype=torch.bfloat16).requires_grad_()
        grouped_linear(rows, weights, groups, gemm, wgrads, computed=weights).sum().backward()

    total, _ = add_up(weights, run, later=False)
    return te_grouped_gemm.calls, [each.data_ptr() for each in total], counts


def test_transformer_engine_is_asked_for_three_products_the_last_into_main_grad() -> None:
    calls, addresses, counts = run_ranks(transformer_engine_calls, 1)[0]
    assert [call.layout for call in calls] == ["TN", "NN", "NT"] * 2
    assert all(call.m_splits == tuple(counts) for call in calls)
    bfloat16 = (torch.bfloat16,) * 3
    for forward, of_rows, of_weights in (calls[:3], calls[3:]):
        assert (forward.grad, forward.accumulate, forward.single_output) == (False, False, True)
        assert (of_rows.grad, of_rows.accumulate, of_rows.single_output) == (True, False, True)
        assert (of_weights.grad, of_weights.accumulate, of_weights.single_output) == (True, True, False)
        assert forward.shapes == ((24, 16), (3, 16), (3, 24))
        assert of_rows.shapes == ((24, 16), (3, 24), (3, 16))
        assert of_weights.shapes == ((3, 16), (3, 24), (24, 16))
        assert forward.dtypes == of_rows.dtypes == bfloat16
        assert of_weights.dtypes == (torch.bfloat16, torch.bfloat16, torch.float32)
        assert [*of_weights.addresses] == addresses, "outputs are not views of main_grad"


def refusal_of_another_transformer_engine(_context: RankContext) -> str:
    from k25_train.errors import ConfigError
    from k25_train.model.grouped_gemm import grouped_gemm
    from tests.helpers import te_grouped_gemm

    te_grouped_gemm.install()
    import sys

    functions: Any = sys.modules["transformer_engine.pytorch.cpp_extensions"]
    functions.general_grouped_gemm = lambda A, B, out, out_dtype, workspaces, layout="TN", **_: None
    sys.modules["transformer_engine"].__version__ = "2.9.0"  # type: ignore[attr-defined]
    try:
        grouped_gemm(transformer_engine=True, dtype=torch.bfloat16)
    except ConfigError as error:
        return str(error)
    return "none"


def test_another_interface_of_transformer_engine_is_refused() -> None:
    (refusal,) = run_ranks(refusal_of_another_transformer_engine, 1)
    assert "Transformer Engine 2.9.0 does not take quantization_params, m_splits" in refusal
    assert "setup.py" in refusal


# Of a whole model ------------------------------------------------------------------------------------------

NUM_MICRO_BATCHES = 1024


def errors_of_many_micro_batches(context: RankContext) -> dict[str, tuple[float, float]]:
    """Of an expert's down-projection and of the output head, in bfloat16: relative rms error of the sum of
    many micro-batches' gradients in `main_grad`, and of such gradients rounded to bfloat16."""
    from k25_train.config.basics import DType
    from k25_train.model import experts as experts_module
    from k25_train.model.weights import initialize
    from parallel.megatron.replicas import replicate
    from tests.helpers.hf_reference import tiny_model_config
    from tests.helpers.model_chunks import SERIAL, WHOLE_MODEL, build_whole_model, start, train_config
    from tests.helpers.tiny_model import modules_of

    # 1. The tiny model as a replica, two of its layers, and what the down-projection gets.
    config = tiny_model_config(num_experts=2, num_experts_per_token=1)
    topology = start(context, SERIAL, config.num_layers)
    model = build_whole_model(config, train_config(dtype=DType.bfloat16), topology).bfloat16()
    initialize(model, WHOLE_MODEL, seed=5, std=0.1)
    (replica,) = replicate([model], model.config, topology)
    [experts, *_] = modules_of(model, "GroupedExperts")
    head = model.language_model.output_layer
    hidden: list[Tensor] = []
    swiglu = experts_module.weighted_swiglu

    def swiglu_and_note(*inputs: Tensor) -> Tensor:
        hidden.append(swiglu(*inputs))
        return hidden[-1]

    experts_module.weighted_swiglu = swiglu_and_note
    # 2. Micro-batches, and their gradients in float64 from the same operands.
    replica.zero_grad_buffer()
    generator = torch.Generator().manual_seed(1)
    sums = {"expert": torch.zeros(3, 64, 32).double(), "head": torch.zeros(3, 64, 64).double()}
    for _ in range(NUM_MICRO_BATCHES):
        tokens, of_output, of_logits = (
            torch.randn(8, width, generator=generator).bfloat16() for width in (64, 64, head.weight.shape[0])
        )
        tokens.requires_grad_()
        experts(tokens, torch.tensor([6, 2]), torch.ones(8))[0].backward(of_output)
        head(tokens.unsqueeze(1))[0].backward(of_logits.unsqueeze(1))
        exact = {
            "expert": of_output[:6].T.double() @ hidden.pop()[:6].detach().double(),
            "head": of_logits[:, :64].T.double() @ tokens.detach().double(),
        }
        for name, gradient in exact.items():
            sums[name][0] += gradient
            sums[name][1] += gradient.bfloat16().double()
    sums["expert"][2] = experts.down_proj.main_grad[0].double()
    sums["head"][2] = head.weight.main_grad[:64].double()
    # 3. Errors.
    return {
        name: tuple(((each - exact).norm() / exact.norm()).item() for each in (found, rounded))
        for name, (exact, rounded, found) in sums.items()
    }


def test_a_thousand_micro_batches_add_up_as_in_float32() -> None:
    (errors,) = run_ranks(errors_of_many_micro_batches, 1)
    for name, (found, rounded) in errors.items():
        assert rounded > 5e-4, name
        assert found < rounded / 300, f"{name}: {found:.1e}, rounded {rounded:.1e}"


class Context:
    """What autograd hands to a function: its engine cannot run on fake CUDA tensors without a GPU."""

    needs_input_grad = (True, True)

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


def allocated_in_backward(_context: RankContext) -> tuple[dict[str, list[str]], list[str]]:
    """On fake CUDA tensors: what a pass allocates of more than half its matrices; all operations."""
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

    from k25_train.model.grouped_gemm import RowGroups, TorchGroupedGemm, _GroupedLinear
    from parallel.megatron.wgrad import own_weight_gradients
    from tests.helpers.allocations import Allocations

    found: dict[str, list[str]] = {}
    with FakeTensorMode():
        # Ranks of tests have the CPU's platform, where `zeros` and the like would be made on the CPU.
        on_cuda = {"device": "cuda", "dtype": torch.bfloat16}
        weights = nn.Parameter(torch.rand(8, 64, 32, **on_cuda))
        weights.main_grad = torch.rand(8, 64, 32, device="cuda")  # type: ignore[attr-defined]
        rows = torch.rand(40, 32, requires_grad=True, **on_cuda)
        # Fake tensors have no values.
        with unset_fake_temporarily():
            counts = torch.full((8,), 5)
        groups = RowGroups(counts, (torch.full((8,), 5, device="cuda", dtype=torch.int32),))
        for name, later in (("at once", False), ("later", True)):
            wgrads = own_weight_gradients(nn.Identity(), weights, later=later)
            context = Context()
            with torch.no_grad(), Allocations() as allocations:
                output = _GroupedLinear.forward(
                    context, rows, weights, weights, groups, TorchGroupedGemm(), wgrads
                )
                assert _GroupedLinear.backward(context, torch.ones_like(output))[1:] == (None,) * 5
                wgrads.compute()
            found[name] = allocations.larger_than(weights.numel() // 2)
    return found, sorted(set(allocations.names))


def test_no_pass_makes_a_tensor_of_the_size_of_the_matrices() -> None:
    found, names = run_ranks(allocated_in_backward, 1)[0]
    assert found == {"at once": [], "later": []}
    assert "aten._grouped_mm.default" in names
    assert "aten.addmm.dtype_out" in names
    assert "aten._to_copy.default" not in names
