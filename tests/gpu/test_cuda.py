"""The same code on a GPU: platform, kernels, and training with and without Transformer Engine.

Tests that import megatron-core run in a process of their own, for a process has one platform only.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.gpu import alone, in_fresh_process, on_gpu
from tests.helpers.runs import SHRUNK, fit, layout, start_run, train
from tests.helpers.tiny_model import expert_loop
from tests.helpers.tiny_shards import tiny_vision_config, write_tiny_shard_set

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_shard_set(tmp_path_factory.mktemp("shards"))


# Platform --------------------------------------------------------------------------------------------------


def work_left() -> tuple[bool, bool]:
    """Whether the device is busy within a second's work, and after it."""
    from parallel.megatron.platform import has_work_left, use_platform

    device = use_platform("cuda")
    torch.cuda._sleep(10**9)
    within = has_work_left(device)
    torch.cuda.synchronize()
    return within, has_work_left(device)


def test_a_busy_device_is_told_from_an_idle_one() -> None:
    assert in_fresh_process(work_left) == (True, False)


def platform_facts() -> dict[str, Any]:
    from parallel.megatron.platform import use_platform

    compile_function, stream = torch.compile, torch.cuda.Stream
    device = use_platform("cuda")
    return {
        "device": str(device),
        "untouched": torch.compile is compile_function and torch.cuda.Stream is stream,
        "literal": str(torch.zeros(1, device="cuda").device),
    }


def test_on_cuda_torch_is_left_alone() -> None:
    assert in_fresh_process(platform_facts) == {
        "device": "cuda:0",
        "untouched": True,
        "literal": "cuda:0",
    }


# Kernels against the CPU -----------------------------------------------------------------------------------


def compare_experts(counts: list[int], transformer_engine: bool) -> list[tuple[Tensor, Tensor]]:
    """(CUDA in bfloat16, a loop on the CPU in float32 over the same rounded values), output and gradients."""
    from parallel.megatron.platform import use_platform

    device = use_platform("cuda")
    from megatron.core.transformer.transformer_config import TransformerConfig

    from k25_train.model.experts import GroupedExperts
    from k25_train.model.grouped_gemm import grouped_gemm

    config = TransformerConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=1,
        num_moe_experts=len(counts),
        moe_ffn_hidden_size=32,
        add_bias_linear=False,
        params_dtype=torch.bfloat16,
    )
    gemm = grouped_gemm(transformer_engine=transformer_engine, dtype=torch.bfloat16)
    groups = SimpleNamespace(ep=None, expt_dp=None)
    experts = GroupedExperts(len(counts), config, pg_collection=groups, gemm=gemm)
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / 4).bfloat16()

    values = [draw(sum(counts), 64), draw(sum(counts)), draw(len(counts), 64, 64), draw(len(counts), 64, 32)]
    weighting = draw(sum(counts), 64)
    with torch.no_grad():
        experts.gate_up_proj.copy_(values[2])
        experts.down_proj.copy_(values[3])
    tokens, weights = (value.to(device).requires_grad_() for value in values[:2])
    inputs = [tokens, weights, experts.gate_up_proj, experts.down_proj]
    grouped, _ = experts(tokens, torch.tensor(counts), weights)
    loss = (grouped * weighting.to(device)).sum()
    found = [grouped, *torch.autograd.grad(loss, inputs, materialize_grads=True)]

    reference = [value.float().requires_grad_() for value in values]
    loop = expert_loop(reference[0], counts, *reference[1:])
    expected = [loop, *torch.autograd.grad((loop * weighting.float()).sum(), reference)]
    return [(a.detach().cpu().float(), b.detach()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("transformer_engine", [True, False])
@pytest.mark.parametrize("counts", [[5, 9, 1, 33], [0, 40, 0, 8], [0, 0, 0, 0]], ids=str)
def test_grouped_experts_equal_a_loop_on_the_cpu(counts: list[int], transformer_engine: bool) -> None:
    for grouped, loop in in_fresh_process(compare_experts, counts, transformer_engine):
        torch.testing.assert_close(grouped, loop, rtol=5e-2, atol=2e-2)


def sums_of_weight_gradients(transformer_engine: bool) -> tuple[Tensor, Tensor]:
    """The sum of 64 micro-batches' gradients of grouped matrices: in `main_grad`, and as float64 has it."""
    from parallel.megatron.platform import use_platform

    device = use_platform("cuda")
    from k25_train.model.grouped_gemm import grouped_gemm, grouped_linear
    from parallel.megatron.wgrad import own_weight_gradients

    counts = [96, 0, 33, 127]
    weights = torch.nn.Parameter(torch.zeros(len(counts), 128, 64, device=device, dtype=torch.bfloat16))
    weights.main_grad = torch.zeros_like(weights, dtype=torch.float32)  # type: ignore[attr-defined]
    gemm = grouped_gemm(transformer_engine=transformer_engine, dtype=torch.bfloat16)
    wgrads = own_weight_gradients(torch.nn.Identity(), weights, later=False)
    exact = torch.zeros(weights.shape, device=device, dtype=torch.float64)
    for _ in range(64):
        rows, gradient = (
            torch.randn(sum(counts), width, device=device, dtype=torch.bfloat16) for width in (64, 128)
        )
        groups = gemm.groups(torch.tensor(counts), device)
        grouped_linear(rows.requires_grad_(), weights, groups, gemm, wgrads, computed=weights).backward(
            gradient
        )
        split = zip(gradient.double().split(counts), rows.detach().double().split(counts), strict=True)
        exact += torch.stack([of_output.T @ part for of_output, part in split])
    return weights.main_grad.double().cpu(), exact.cpu()  # type: ignore[union-attr]


@pytest.mark.parametrize("transformer_engine", [True, False])
def test_weight_gradients_add_up_as_in_float32(transformer_engine: bool) -> None:
    found, exact = in_fresh_process(sums_of_weight_gradients, transformer_engine)
    assert (found - exact).norm() < 1e-5 * exact.norm(), "rounded to bfloat16 it would be 1e-3"


def test_the_tower_computes_what_it_computes_on_the_cpu() -> None:
    from k25_train.model.moonvit import MoonViT3D

    torch.manual_seed(1)
    tower = MoonViT3D(tiny_vision_config())
    grids = [(1, 4, 6), (4, 2, 6), (1, 4, 6), (2, 4, 4)]
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), 588)

    def features_and_gradients(device: str) -> list[Tensor]:
        on_device = tower.to(device)
        on_device.zero_grad()
        features = on_device(pixels.to(device), grids)
        features.square().sum().backward()
        return [features.detach().cpu(), *(weight.grad.cpu() for weight in on_device.parameters())]

    on_cpu = features_and_gradients("cpu")
    for found, expected in zip(features_and_gradients("cuda"), on_cpu, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


# Training --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_cpu(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    """The float32 run of one CPU process."""
    arguments = [*SHRUNK, *layout(), f"data.dir={data}", f"run.dir={tmp_path_factory.mktemp('cpu')}"]
    return in_fresh_process(train, alone(), arguments)


@pytest.mark.parametrize("engine", ["true", "false"])
def test_bfloat16_on_a_gpu_learns_as_float32_on_the_cpu(
    engine: str, data: Path, on_cpu: list[tuple[float, float]], tmp_path: Path
) -> None:
    arguments = on_gpu(data, tmp_path, f"train.transformer_engine={engine}")
    losses, norms = zip(*in_fresh_process(train, alone(), arguments), strict=True)
    expected_losses, expected_norms = zip(*on_cpu, strict=True)
    assert losses[0] == pytest.approx(expected_losses[0], rel=1e-2)
    assert norms[0] == pytest.approx(expected_norms[0], rel=5e-2)
    assert losses == pytest.approx(expected_losses, rel=5e-2)
    assert losses[-1] < 0.9 * losses[0]


def losses_in(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("engine", ["true", "false"])
def test_a_run_resumes_on_a_gpu(engine: str, data: Path, tmp_path: Path) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    options = [
        f"train.transformer_engine={engine}",
        "checkpoint.interval=3",
        "optim.lr=1.0e-3",
        "optim.min_lr=1.0e-3",
        "optim.warmup=1",
        "optim.decay=1",
    ]
    in_fresh_process(fit, alone(), on_gpu(data, whole, *options, "train.steps=6"))
    in_fresh_process(fit, alone(), on_gpu(data, cut, *options, "train.steps=3"))
    in_fresh_process(fit, alone(), on_gpu(data, cut, *options, "train.steps=6"))
    assert len(losses_in(cut)) == 6
    assert losses_in(cut) == pytest.approx(losses_in(whole), rel=1e-3)


def weights_on_gpu(arguments: list[str]) -> dict[str, Any]:
    """Kinds of what one GPU holds."""
    run = start_run(alone(), arguments)
    run.data.close()
    [chunk] = run.chunks
    return {
        "modules": {type(module).__name__ for module in chunk.modules()},
        "devices": {str(weight.device) for weight in chunk.parameters()},
        "types": {weight.dtype for weight in chunk.parameters()},
        "names": [name for name, _ in chunk.named_parameters()],
    }


def test_transformer_engine_changes_modules_but_no_names(data: Path, tmp_path: Path) -> None:
    engine, without = (
        in_fresh_process(weights_on_gpu, on_gpu(data, tmp_path, f"train.transformer_engine={flag}"))
        for flag in ("true", "false")
    )
    assert {"TEColumnParallelLinear", "TERowParallelLinear"} <= engine["modules"] - without["modules"]
    assert engine["names"] == without["names"]
    for held in (engine, without):
        assert held["devices"] == {"cuda:0"}
        assert held["types"] == {torch.bfloat16}
