"""A stand-in for Transformer Engine 2.20 on the CPU, and the model built with it.

Transformer Engine needs CUDA to be installed. What the model needs of it is three modules, `Linear`,
`RMSNorm` and `DotProductAttention` (`packed_attention.py`), and grouped products (`te_grouped_gemm.py`); here
they have its signatures, its demand that inputs and weights are of one type, its extra state and its way with
`main_grad`, and compute the same with torch. Everything else that megatron-core imports is a mock.

`python -m tests.helpers.transformer_engine_twin` compares the model built with and without, and prints what
it found as JSON. It needs a process of its own: megatron-core looks for Transformer Engine when imported.
"""

import contextlib
import importlib.abc
import importlib.machinery
import json
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from k25_train.config.cluster import Device
from tests.helpers import te_grouped_gemm
from tests.helpers.packed_attention import DotProductAttention
from tests.helpers.tiny_model import modules_of


class WithExtraState(nn.Module):
    """Transformer Engine's modules save their FP8 state as bytes; without FP8 there are none."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None: ...


class Linear(WithExtraState):
    """`transformer_engine.pytorch.Linear`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
    ) -> None:
        super().__init__()
        assert parallel_mode in (None, "row", "column") and not bias and not return_bias
        self.parallel_mode, self.fuse_wgrad_accumulation = parallel_mode, fuse_wgrad_accumulation
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        self.bias = torch.empty(0, dtype=params_dtype, device=device)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        if inp.dtype is not self.weight.dtype:
            raise TypeError(f"input is {inp.dtype}, weight is {self.weight.dtype}")
        if self.fuse_wgrad_accumulation:
            return te_grouped_gemm.FusedLinear.apply(inp, self.weight)
        return F.linear(inp, self.weight)


class RMSNorm(WithExtraState):
    """`transformer_engine.pytorch.RMSNorm`."""

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        *,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape, dtype=params_dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def general_gemm(
    a: Tensor, b: Tensor, *, out_dtype: torch.dtype, layout: str, **_: Any
) -> tuple[Tensor, None, None, None]:
    """Column-major products, as megatron-core's router asks for them."""
    left = b.T if layout[1] == "T" else b
    right = a.T if layout[0] == "T" else a
    return left.to(out_dtype) @ right.to(out_dtype), None, None, None


class Twin(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `transformer_engine` and every module below it."""

    def __init__(self) -> None:
        self.root = MagicMock(__version__="2.20.0")
        pytorch = self.root.pytorch
        pytorch.Linear, pytorch.RMSNorm = Linear, RMSNorm
        pytorch.DotProductAttention = DotProductAttention
        for base in ("LayerNormLinear", "GroupedLinear"):
            setattr(pytorch, base, type(base, (nn.Module,), {}))
        pytorch.distributed.CudaRNGStatesTracker = type("CudaRNGStatesTracker", (), {})
        self.root.common.recipe.DelayedScaling = type("DelayedScaling", (), {})
        pytorch.optimizers.FusedAdam = torch.optim.AdamW
        pytorch.cpp_extensions.general_gemm = general_gemm
        pytorch.cpp_extensions.general_grouped_gemm = te_grouped_gemm.general_grouped_gemm
        no_offload = (contextlib.nullcontext(), lambda tensor: tensor)
        pytorch.cpu_offload.get_cpu_offload_context = lambda *_, **__: no_offload

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != "transformer_engine":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        module = self.root
        for part in spec.name.split(".")[1:]:
            module = getattr(module, part)
        return module

    def exec_module(self, module: ModuleType) -> None: ...


def build_pair() -> tuple[Any, Any]:
    """The shrunk smoke model in bfloat16, with megatron-core's modules and with the twin's."""
    from k25_train.compose.resolve import compose
    from k25_train.model.build import build_model
    from k25_train.model.megatron_config import backbone_config
    from k25_train.plan.pipeline import layout_of
    from parallel.megatron.platform import use_platform
    from parallel.topology import build_topology, start_process_group
    from tests.helpers.runs import SHRUNK, layout

    device = use_platform("cpu")
    config = compose([*SHRUNK, *layout(), "train.dtype=bfloat16"])
    pipeline = layout_of(config)
    start_process_group(device, 30.0, dist.HashStore())
    topology = build_topology(config.parallelism, pipeline, device)
    backbone = backbone_config(config.model, config.train, config.parallelism, pipeline)
    ours = build_model(config, backbone, topology)
    # The configuration rightly refuses this on the CPU. A cuDNN of that version gives largest logits.
    config.train.transformer_engine = True
    config.cluster.device = Device.cuda
    torch.backends.cudnn.version = lambda: 92100
    twin = build_model(config, backbone, topology)
    for model in (ours, twin):
        model.initialize(config.train.seed, config.model.init_std)
    return ours.chunks[0], twin.chunks[0]


DOCUMENTS, NUM_REAL = (50, 58, 20), 108
"""Tokens of two documents and of padding, and of the documents."""


def run(chunk: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of two documents, and the gradients of their sum as data parallelism would have them."""
    from k25_train.model.packed_documents import PackedDocuments

    tokens = torch.arange(128) % 300
    documents = PackedDocuments.of(DOCUMENTS, torch.device("cpu"), (2,))
    for core in modules_of(chunk, "DocumentAttention"):
        core.record_max_logits = True
    weights = dict(chunk.named_parameters())
    for weight in weights.values():
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        weight.grad_added_to_main_grad = False
    losses = chunk(tokens, documents, labels=tokens.flip(0))[:NUM_REAL]
    losses.sum().backward()
    for weight in weights.values():
        if weight.grad is not None and not weight.grad_added_to_main_grad:
            weight.main_grad.add_(weight.grad)
    return losses.detach(), {name: weight.main_grad for name, weight in weights.items()}


def records_of_attention(chunk: Any) -> list[tuple[str, tuple[int, ...], int]]:
    """What a pass saves of attention's own results: name, shape, bytes."""
    from k25_train.compose.resolve import compose
    from k25_train.model.packed_documents import PackedDocuments
    from parallel.activations.saving_pass import SaveRecord, SavingPass
    from parallel.activations.storage import weights_of
    from parallel.pipeline.schedule import PassKey

    stored: list[SaveRecord] = []
    policies = compose(["experiment=smoke"]).activation.policies()
    saving = SavingPass(policies, PassKey(0, 0), weights_of([chunk]), None, stored.append)
    tokens = torch.arange(128) % 300
    documents = PackedDocuments.of(DOCUMENTS, torch.device("cpu"), (2,))
    with saving.active():
        losses = chunk(tokens, documents, labels=tokens)
    losses.sum().backward()
    return [
        (each.name, each.shape, each.device_bytes) for each in stored if each.name.startswith("attention.")
    ]


def compare() -> dict[str, Any]:
    """The model with Transformer Engine's modules against the one without."""
    from k25_train.model.weights import ChunkPlace, global_state

    place = ChunkPlace(first_layer=0, first_expert=0)
    ours, twin = build_pair()
    (losses, gradients), (twin_losses, twin_gradients) = run(ours), run(twin)
    products = [call.layout for call in te_grouped_gemm.calls]
    calls = [dict(call) for call in DotProductAttention.calls]
    logits = [
        torch.stack([core.max_logits for core in modules_of(model, "DocumentAttention")])
        for model in (ours, twin)
    ]
    differences = [(gradients[name] - twin_gradients[name]).abs().max().item() for name in gradients]
    return {
        "modules": sorted({type(module).__name__ for module in twin.modules()}),
        "epsilons": {
            name.rsplit(".", 1)[1]: module.eps
            for name, module in twin.named_modules()
            if isinstance(module, RMSNorm)
        },
        "parameters": [[*dict(model.named_parameters())] for model in (ours, twin)],
        "global names": [[name for name, _ in global_state(model, place)] for model in (ours, twin)],
        "gradients": [
            sorted(name for name in each if each[name].any()) for each in (gradients, twin_gradients)
        ],
        "grouped products": products,
        "attention": calls,
        "logits": [each.tolist() for each in logits],
        "saved": records_of_attention(twin),
        "difference": max((losses - twin_losses).abs().max().item(), *differences),
    }


if __name__ == "__main__":
    sys.meta_path.insert(0, Twin())
    print(json.dumps(compare()))
