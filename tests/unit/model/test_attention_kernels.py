"""Attention as CUDA runs it: one call whatever the documents, no plan by lengths, the CPU path's numbers."""

import os
import random
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from k25_train.compose.resolve import compose
from k25_train.config.basics import DType
from k25_train.config.cluster import Device
from k25_train.errors import ConfigError
from k25_train.model import attention_kernels
from k25_train.model.attention_kernels import NOT_TAKEN, DocumentAttend, HeadSizes, build_attention
from k25_train.model.documents import DocumentBounds
from k25_train.model.max_logits import max_logits_of_documents
from k25_train.plan.memory.attention_saves import attention_outputs, document_boundaries
from k25_train.plan.memory.kernels import AttentionKernel, attention_kernel
from k25_train.plan.pass_sizes import PassSizes
from tests.helpers.logits_cost import logits_cost
from tests.helpers.packed_attention import DotProductAttention, varlen_on_cpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SCALE = 0.2
HEADS = HeadSizes(num_heads=4, query=24, value=16)
ONE_CALL = (AttentionKernel.varlen, AttentionKernel.transformer_engine)
BATCHES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((64,), ()),
    ((1,) * 64, ()),
    ((20, 1, 33, 10), ()),
    ((3, 20, 4, 1, 29, 7), (0, 2, 5)),
]
"""Documents of 64 tokens, and which of them are padding."""


@pytest.fixture(autouse=True)
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in is installed, with a cuDNN that gives largest logits; `varlen_attn` runs on the CPU."""
    pytorch = SimpleNamespace(DotProductAttention=DotProductAttention)
    monkeypatch.setitem(sys.modules, "transformer_engine", SimpleNamespace(__version__="2.20.0+1234"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", pytorch)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92100)
    for name in NOT_TAKEN:
        monkeypatch.setenv(name, "0")
    # Fake tensors cannot be page-locked.
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    DotProductAttention.calls.clear()
    varlen_on_cpu()


def built(kernel: AttentionKernel, heads: HeadSizes = HEADS, longest: int = 64) -> DocumentAttend:
    return build_attention(kernel, heads, SCALE, layer_number=1, max_document_tokens=longest)


def rows(device: torch.device, dtype: torch.dtype, tokens: int, heads: HeadSizes = HEADS) -> list[Tensor]:
    """Query, key and value of so many tokens, which need gradients."""
    widths = (heads.query, heads.query, heads.value)
    torch.manual_seed(tokens)
    return [
        torch.randn(tokens, heads.num_heads, width, device=device, dtype=dtype, requires_grad=True)
        for width in widths
    ]


class Spy(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))

    def attentions(self) -> dict[str, int]:
        return {name: number for name, number in self.seen.items() if "attention" in name or "attn" in name}


@pytest.mark.parametrize(
    ("device", "dtype", "engine", "kernel"),
    [
        (Device.cpu, DType.bfloat16, False, AttentionKernel.cpu),
        (Device.cuda, DType.bfloat16, False, AttentionKernel.varlen),
        (Device.cuda, DType.bfloat16, True, AttentionKernel.transformer_engine),
        (Device.cuda, DType.float32, True, AttentionKernel.float32),
    ],
)
def test_the_configuration_chooses_the_kernel(
    device: Device, dtype: DType, engine: bool, kernel: AttentionKernel
) -> None:
    assert attention_kernel(device, dtype, transformer_engine=engine) is kernel


@pytest.mark.parametrize("kernel", ONE_CALL)
@pytest.mark.parametrize(("lengths", "padding"), BATCHES)
def test_one_call_computes_what_a_call_per_document_does(
    kernel: AttentionKernel, lengths: tuple[int, ...], padding: tuple[int, ...]
) -> None:
    documents = DocumentBounds.of(lengths, CPU, padding)
    is_real = documents.first_keys < 64
    found = []
    for each in (AttentionKernel.cpu, kernel):
        inputs = rows(CPU, torch.float32, 64)
        attended = built(each).attend(*inputs, documents)
        assert attended.shape == (64, 64)
        # Nothing of padding reaches anybody.
        (attended * is_real[:, None]).square().sum().backward()
        gradients = [each.grad.flatten() for each in inputs if each.grad is not None]
        found.append(torch.cat([attended[is_real].detach().flatten(), *gradients]))
    expected, result = found
    # Together: a document of one token has no gradient for its query, but for rounding.
    assert (result - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("kernel", ONE_CALL)
def test_one_call_on_cuda_whatever_the_documents(kernel: AttentionKernel) -> None:
    for lengths, padding in BATCHES:
        with FakeTensorMode(), Spy() as spy:
            documents = DocumentBounds.of(lengths, CUDA, padding)
            built(kernel).attend(*rows(CUDA, torch.bfloat16, 64), documents)
        calls = len(DotProductAttention.calls) + spy.seen["torch_attn._varlen_attn"]
        assert calls == 1, f"{lengths}: {spy.attentions()}"
        assert not {*spy.attentions()} - {"torch_attn._varlen_attn"}
        DotProductAttention.calls.clear()


def random_lengths(rng: random.Random, tokens: int) -> list[int]:
    """As packing has them: some long documents, many short ones, often a remainder."""
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(min(max(1, round(rng.lognormvariate(6, 1.5))), tokens - sum(lengths)))
    return lengths


def test_transformer_engine_meets_one_shape_in_200_batches() -> None:
    """What its plans and its choice of a backend are keyed on: rows, documents, longest, kind."""
    rng, heads = random.Random(0), HeadSizes(64, 192, 128)
    lengths_seen = set()
    attention = built(AttentionKernel.transformer_engine, heads, 4096)
    with FakeTensorMode():
        inputs = rows(CUDA, torch.bfloat16, 4096, heads)
        for _ in range(200):
            lengths = random_lengths(rng, 4096)
            lengths_seen.update(lengths)
            padding = [len(lengths) - 1] if rng.random() < 0.5 else []
            attention.attend(*inputs, DocumentBounds.of(lengths, CUDA, padding))
    assert len(lengths_seen) > 500
    keys = {tuple(call.items()) for call in DotProductAttention.calls}
    assert len(DotProductAttention.calls) == 200
    assert len(keys) == 1, keys


@pytest.mark.parametrize("kernel", ONE_CALL)
def test_the_plan_lists_what_the_call_saves(kernel: AttentionKernel) -> None:
    heads, lengths = HeadSizes(64, 192, 128), (1000, 3, 3093)
    saved: Counter[tuple[tuple[int, ...], int]] = Counter()
    with FakeTensorMode():
        inputs = rows(CUDA, torch.bfloat16, 4096, heads)
        documents = DocumentBounds.of(lengths, CUDA)
        seen = {each.untyped_storage()._cdata for each in inputs}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()._cdata
            if storage not in seen:
                seen.add(storage)
                saved[tuple(tensor.shape), tensor.nbytes] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            attended = built(kernel, heads, 4096).attend(*inputs, documents)
            attended.square()
    width = heads.query if kernel.pads_values else heads.value
    sizes = PassSizes(
        documents=lengths, padding_tokens=0, num_sequences=1, expert_rows=1, local_experts=1, patches=0,
        vision_tokens=0,
    )  # fmt: skip
    outputs = attention_outputs(kernel, sizes, heads.num_heads, width, 2)
    planned = [*outputs, *document_boundaries(kernel, sizes)]
    expected = Counter((each.shape, each.num_bytes) for each in planned)
    if kernel is AttentionKernel.varlen:
        # Padded values, which are the projection's; and the output joined.
        expected[(4096, 64, 192), 4096 * 64 * 192 * 2] += 1
        expected[(4096, 64 * 128), 4096 * 64 * 128 * 2] += 1
    assert saved == expected


def measured(kernel: AttentionKernel, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Largest logits by a kernel, and as they should be, of documents among padding with larger ones."""
    launched: list[Tensor] = []

    def launch(query: Tensor, key: Tensor, first_keys: Tensor, last_keys: Tensor, scale: float) -> Tensor:
        launched.append(first_keys)
        expected = max_logits_of_documents(query, key, documents, scale)
        assert expected is not None
        return expected

    monkeypatch.setattr(attention_kernels, "largest_logits", launch)
    lengths, padding = BATCHES[-1]
    documents = DocumentBounds.of(lengths, CPU, padding)
    query, key, value = rows(CPU, torch.float32, 64)
    with torch.no_grad():
        key[:3] = query[:3] = key[-7:] = 1e3
    expected = max_logits_of_documents(query, key, documents, SCALE)
    _, largest = built(kernel).attend_and_measure(query, key, value, documents)
    assert expected is not None and largest is not None and not largest.requires_grad
    assert len(launched) == (kernel is AttentionKernel.varlen)
    return largest, expected


@pytest.mark.parametrize("kernel", [AttentionKernel.cpu, *ONE_CALL])
def test_largest_logits_leave_padding_out(kernel: AttentionKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.testing.assert_close(*measured(kernel, monkeypatch), rtol=1e-6, atol=1e-6)


def test_transformer_engine_with_an_older_cudnn_does_not_return_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would compute all of attention without a fused kernel."""
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    with pytest.raises(AssertionError):
        measured(AttentionKernel.transformer_engine, monkeypatch)
    assert not any(call["max logits"] for call in DotProductAttention.calls)


def test_transformer_engine_takes_nothing_but_cudnns_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention 3 would leave rows of padding as memory was, and weight gradients add them up."""
    for name in NOT_TAKEN:
        monkeypatch.delenv(name)
    built(AttentionKernel.transformer_engine)
    assert {name: os.environ[name] for name in NOT_TAKEN} == {
        "NVTE_UNFUSED_ATTN": "0",
        "NVTE_FLASH_ATTN": "0",
    }


def test_an_older_transformer_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", SimpleNamespace(__version__="2.9.0"))
    with pytest.raises(ConfigError, match=r"transformer_engine is 2\.9\.0: .* needs 2\.20 or later"):
        built(AttentionKernel.transformer_engine)


@pytest.mark.parametrize("num_tokens", [4096, 32768, 262144])
def test_largest_logits_cost_a_sixth_of_attention_and_no_memory(num_tokens: int) -> None:
    model = compose(["experiment=k25_pretrain_4k"]).model
    whole, halves = ([num_tokens], [num_tokens // 2] * 2)
    for lengths in (whole, halves):
        cost = logits_cost(model, lengths)
        # Blocks are computed whole: on the diagonal that is twice what counts.
        assert cost.share < 1 / 6 * (1 + 2 * 128 / min(lengths)) + 0.001
        assert cost.memory_bytes <= num_tokens // 128 * 64 * 4


@pytest.mark.parametrize("kernel", ONE_CALL)
def test_measuring_launches_as_much_whatever_the_documents(
    kernel: AttentionKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    heads, seen = HeadSizes(64, 192, 128), []
    for lengths in ((262144,), (1,) * 40 + (262104,), (60000, 202144)):
        attention = built(kernel, heads, 262144)
        with FakeTensorMode():
            inputs, documents = (
                rows(CUDA, torch.bfloat16, 262144, heads),
                DocumentBounds.of(lengths, CUDA),
            )
            with Spy() as spy:
                attention.attend_and_measure(*inputs, documents)
        assert spy.seen["k25.largest_logits"] == 1
        seen.append(sum(spy.seen.values()))
    assert len({*seen}) == 1 and seen[0] < 100, seen


def test_bounds_know_where_each_token_may_look() -> None:
    documents = DocumentBounds.of((2, 3, 1, 2), CPU, (1, 3))
    assert documents.boundaries.tolist() == [0, 2, 5, 6, 8]
    assert documents.table.shape == (2, 33)
    assert documents.table[1, :5].tolist() == [0, 2, 2, 3, 3]
    assert documents.table[:, 5:].unique(dim=1).tolist() == [[8], [3]]
    assert documents.first_keys.tolist() == [0, 0, 8, 8, 8, 5, 8, 8]
    assert documents.last_keys.tolist() == [*range(8)]
    assert DocumentBounds.of((1,) * 33, CPU).table.shape == (2, 65)
