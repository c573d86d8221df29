"""Training with experts as INT4 has them: gradients, layouts, what passes compute with, what is exported."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from k25_train.int4 import Int4Weight, dequantize, fake_quantize
from tests.helpers.activation_policies import EXACT_K2
from tests.helpers.exported_run import train_briefly
from tests.helpers.parity import (
    BFLOAT16_TOLERANCE,
    CONTEXT_CASES,
    EVERYTHING_OVERLAPS,
    TOLERANCE,
    Case,
    Parity,
)
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run
from tests.helpers.tiny_model import build_random_model, expert_loop, modules_of

pytestmark = pytest.mark.distributed

QAT = ("model.quantization=int4_qat", "model.expert_ffn_hidden_size=32")
THREE_STEPS = ("train.steps=3", "optim.warmup=1", "optim.decay=1")
"""Rounding is no continuous function: sooner or later a difference of 1e-8 makes a weight fall to the other
side of the edge between two codes, and the gradient's norm then differs by 1e-5. The more weights, the
sooner: the deepest model of these did in step 5."""


def compare_experts(context: RankContext, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(ours, expected) of the output and of every gradient: those of a loop over experts with rounded
    weights, the gradients of these taken for the weights'."""
    from k25_train.config.model import Quantization

    model = build_random_model(context, quantization=Quantization.int4_qat).to(dtype)
    [experts, *_] = modules_of(model, "GroupedExperts")
    generator = torch.Generator().manual_seed(2)
    counts = [5, 0, 1, 30, 4, 17, 2, 6]
    tokens = torch.randn(sum(counts), 64, generator=generator).to(dtype).requires_grad_()
    weights = torch.rand(sum(counts), generator=generator).requires_grad_()
    weighting = torch.randn(sum(counts), 64, generator=generator).to(dtype)
    inputs = [tokens, weights, experts.gate_up_proj, experts.down_proj]
    output, _ = experts(tokens, torch.tensor(counts), weights)
    found = [output, *torch.autograd.grad((output * weighting).sum(), inputs)]
    rounded = [fake_quantize(each.detach()).requires_grad_() for each in inputs[2:]]
    assert not any(torch.equal(a, b) for a, b in zip(rounded, inputs[2:], strict=True))
    loop = expert_loop(tokens, counts, weights.to(dtype), *rounded)
    expected = [loop, *torch.autograd.grad((loop * weighting).sum(), [tokens, weights, *rounded])]
    return [(a.detach().float(), b.detach().float()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), pytest.param(torch.bfloat16, 2e-2, marks=pytest.mark.slow)],
)
def test_gradients_go_straight_through(dtype: torch.dtype, tolerance: float) -> None:
    for ours, expected in run_ranks(compare_experts, 1, dtype)[0]:
        torch.testing.assert_close(
            ours, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        )


LAYOUTS = (
    Case({"pp": 2, "vpp": 2, "ep": 2, "dp": 2}, more=EVERYTHING_OVERLAPS),
    CONTEXT_CASES[0],
    Case({"dp": 4}),
    Case({"ep": 2, "dp": 2}, more=("activation=keep", *EXACT_K2)),
    Case({"ep": 2, "dp": 2}, more=("optim.offload=cpu", "dep.schedule=bubbles")),
    Case({"pp": 4, "vpp": 2, "ep": 4, "dp": 4}, 16),
)
"""All at once; shared sequences; replicas; policies of activations; the optimizer in the host; 16 ranks."""


@pytest.mark.parametrize(
    "case",
    [LAYOUTS[0], *(pytest.param(each, marks=pytest.mark.slow) for each in LAYOUTS[1:])],
    ids=lambda case: case.name,
)
def test_a_layout_trains_like_one_process(case: Case, parity: Parity) -> None:
    assert parity.difference(case, *QAT, *THREE_STEPS) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("changes", [("optim=adamw",), ("activation=k2",)], ids=" ".join)
def test_layouts_agree_with_other_updates_and_policies(changes: Sequence[str], parity: Parity) -> None:
    found = parity.difference(LAYOUTS[0], *QAT, *THREE_STEPS, *changes)
    assert found <= (TOLERANCE if changes[0].startswith("optim") else BFLOAT16_TOLERANCE)


@pytest.mark.slow
def test_layouts_agree_in_bfloat16_as_far_as_it_goes(parity: Parity) -> None:
    found = parity.difference(LAYOUTS[0], *QAT, *THREE_STEPS, "train.dtype=bfloat16")
    assert found <= BFLOAT16_TOLERANCE


def experts_of(run: Any) -> Iterator[Any]:
    for chunk in run.chunks:
        yield from modules_of(chunk, "GroupedExperts")


def copies_of_steps(context: RankContext, arguments: list[str]) -> list[tuple[bool, bool, int]]:
    """Of three steps and an evaluation behind each: whether passes computed with what INT4 makes of the
    weights before the update; whether the evaluation did with those behind it; how many copies were made."""
    from k25_train.model import quantization
    from k25_train.training.evaluation import eval_losses
    from k25_train.training.step import train_step
    from parallel.megatron.replicas import complete_parameters

    made = []
    make = quantization.fake_quantize_into
    quantization.fake_quantize_into = lambda copy, weights: made.append(1) or make(copy, weights)  # type: ignore
    run = start_run(context, arguments)

    def expected() -> list[Tensor]:
        complete_parameters(run.modules)
        return [fake_quantize(each.detach()) for every in experts_of(run) for each in every.parameters()]

    def computed() -> list[Tensor]:
        return [copy.clone() for every in experts_of(run) for copy in every.computed.buffers()]

    def alike(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(torch.equal(*pair) for pair in zip(a, b, strict=True))

    found = []
    with run.data:
        for step in (1, 2, 3):
            before = expected()
            made.clear()
            train_step(run, step)
            trained, num_made = computed(), len(made)
            after = expected()
            assert not alike(before, after), "the update changed what INT4 makes of the weights"
            eval_losses(run, 4)
            found.append((alike(trained, before), alike(computed(), after), num_made))
    return found


def test_each_step_computes_with_its_own_weights_rounded_once(data: Path, tmp_path: Path) -> None:
    """Two layers of two stacks each on a rank; several micro-batches, weights gathered late."""
    arguments = overrides(data, tmp_path, *layout(ep=2, dp=2), *QAT, *EVERYTHING_OVERLAPS)
    for found in run_ranks(copies_of_steps, 2, [*arguments, "model.num_layers=3"]):
        assert found == [(True, True, 4)] * 3


def computed_in_evaluation(context: RankContext, checkpoint: str) -> list[dict[str, Tensor]]:
    """Of each layer with experts, what an evaluation of a checkpoint computes with."""
    os.environ.update(context.environment())
    from k25_train.eval import evaluate, read_arguments
    from k25_train.model.quantization import AsInt4

    found: list[dict[str, Tensor]] = []
    release = AsInt4.release_weights

    def note(computed: AsInt4) -> None:
        found.append({name: each.clone() for name, each in computed.named_buffers()})
        release(computed)

    AsInt4.release_weights = note  # type: ignore[method-assign]
    evaluate(*read_arguments([f"checkpoint={checkpoint}"]))
    return found


def exported(folder: Path, layer: int, expert: int, name: str) -> Tensor:
    """An expert's matrix by the bytes of an exported folder."""
    stored = {key: each for path in folder.glob("*.safetensors") for key, each in load_file(path).items()}
    source = f"language_model.model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
    return dequantize(Int4Weight(stored[f"{source}_packed"], stored[f"{source}_scale"]))


def test_an_export_has_the_bytes_that_passes_compute_with(tmp_path: Path) -> None:
    from k25_train.convert.__main__ import main as convert

    checkpoint, tokenizer = train_briefly(tmp_path, *QAT)
    folder = tmp_path / "exported"
    words = f"export {checkpoint} {folder} --dtype int4 --tokenizer {tokenizer} --workers 1"
    assert convert(words.split()) == 0
    layers = run_ranks(computed_in_evaluation, 1, str(checkpoint))[0]
    assert len(layers) == 4
    for layer, computed in enumerate(layers, 1):
        for expert in range(4):
            gate, up, down = (exported(folder, layer, expert, name) for name in ("gate", "up", "down"))
            assert torch.equal(computed["gate_up_proj"][expert], torch.cat([gate, up]).float())
            assert torch.equal(computed["down_proj"][expert], down.float())
