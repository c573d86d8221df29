"""The tower's attention as CUDA runs it: one call per block whatever the items, the CPU path's numbers."""

import random
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from k25_train.config.basics import DType
from k25_train.config.cluster import Device
from k25_train.model.moonvit import MoonViT3D
from k25_train.model.moonvit_attention import attention_over
from k25_train.model.moonvit_items import Grid, PackedItems, pack_items, pack_part
from k25_train.plan.memory.kernels import AttentionKernel, vision_attention_kernel
from tests.helpers.hf_reference import tiny_vision_config
from tests.helpers.packed_attention import varlen_on_cpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ITEMS: list[Sequence[Grid]] = [
    [(1, 4, 6)],
    [(1, 2, 2)] * 5,
    [(1, 8, 2), (3, 2, 2), (1, 2, 6), (1, 4, 4), (2, 2, 2)],
]


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fake tensors cannot be page-locked.
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    varlen_on_cpu()


def difference(items: PackedItems, keys: int) -> float:
    """Between the two implementations, of outputs and gradients, relative to their size."""
    queries = sum(length * num_items for length, num_items in items.segments)
    found = []
    for kernel in (AttentionKernel.cpu, AttentionKernel.varlen):
        torch.manual_seed(keys)
        inputs = [torch.randn(queries, 3, 72, requires_grad=True) for _ in range(3)]
        attended = attention_over(items, CPU, kernel)(*inputs)
        attended.square().sum().backward()
        gradients = [each.grad.flatten() for each in inputs if each.grad is not None]
        found.append(torch.cat([attended.detach().flatten(), *gradients]))
    return float((found[1] - found[0]).norm() / found[0].norm())


@pytest.mark.parametrize("grids", ITEMS, ids=str)
def test_one_call_computes_what_a_call_per_length_does(grids: Sequence[Grid]) -> None:
    assert difference(pack_items(grids), 1) < 1e-6


def test_a_part_attends_to_its_whole_item() -> None:
    """What `gather` returns stands for the keys of all parts; here three copies of its own."""
    part: Any = SimpleNamespace(row=2, num_rows=2, gather=lambda own: torch.cat([own, 2 * own, own]))
    assert difference(pack_part([(1, 6, 4)], part), 24) < 1e-6


def test_no_items_attend_to_nothing() -> None:
    empty = torch.zeros(0, 3, 72)
    assert attention_over(pack_items([]), CPU, AttentionKernel.varlen)(empty, empty, empty) is empty


def test_the_configuration_chooses_the_kernel() -> None:
    assert vision_attention_kernel(Device.cpu, DType.bfloat16) is AttentionKernel.cpu
    assert vision_attention_kernel(Device.cuda, DType.bfloat16) is AttentionKernel.varlen
    assert vision_attention_kernel(Device.cuda, DType.float32) is AttentionKernel.float32


class Attentions(TorchDispatchMode):
    """Calls of attention, by operator and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        if "attn" in name or "attention" in name:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def test_one_call_per_block_on_cuda_in_200_batches() -> None:
    """Native resolution: hardly two batches have the same sizes, and a plan for each would be built."""
    rng = random.Random(1)
    with FakeTensorMode():
        with CUDA:
            qkv = [torch.empty(4096, 3, 72, dtype=torch.bfloat16) for _ in range(3)]
        for _ in range(200):
            grids = [(1, 2 * rng.randint(1, 9), 2 * rng.randint(1, 9)) for _ in range(rng.randint(1, 9))]
            patches = sum(t * h * w for t, h, w in grids)
            attend = attention_over(pack_items(grids), CUDA, AttentionKernel.varlen)
            with Attentions() as spy:
                attend(*(each[:patches] for each in qkv))
            assert spy.seen == {"torch_attn._varlen_attn": 1}, grids


def test_the_tower_attends_once_per_block(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = ITEMS[-1]
    vision = tiny_vision_config()
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), 588)
    expected = MoonViT3D(vision)
    tower = MoonViT3D(vision, AttentionKernel.varlen)
    tower.load_state_dict(expected.state_dict())
    with Attentions() as spy:
        features = tower(pixels, grids)
    assert spy.seen["torch_attn._varlen_attn"] == vision.num_layers
    torch.testing.assert_close(features, expected(pixels, grids), rtol=1e-5, atol=1e-5)
