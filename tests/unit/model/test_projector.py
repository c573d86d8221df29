"""The patch-merger projector, alone and behind the tower, against transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from k25_train.model.moonvit import MoonViT3D
from k25_train.model.projector import PatchMergerProjector
from tests.helpers.hf_reference import (
    build_hf_reference,
    hf_image_features,
    tiny_model_config,
    tiny_vision_config,
)

GRIDS = [(1, 8, 4), (3, 6, 4), (1, 2, 2), (4, 2, 10), (2, 4, 6), (1, 8, 4)]


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def reference() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    return build_hf_reference(tiny_model_config())


@pytest.fixture
def projector(reference: tuple[torch.nn.Module, dict[str, Tensor]]) -> PatchMergerProjector:
    projector = PatchMergerProjector(tiny_vision_config(), text_hidden_size=64)
    projector.load_state_dict(prefixed(reference[1], "mm_projector."))
    return projector


def test_equals_transformers_with_gradients(
    projector: PatchMergerProjector, reference: tuple[torch.nn.Module, dict[str, Tensor]]
) -> None:
    hf_projector = reference[0].model.mm_projector
    features = 3 * torch.randn(50, 4, 48, generator=torch.Generator().manual_seed(0)) + 1
    expected = hf_projector(features).squeeze(1)
    actual = projector(features)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    hf_projector.zero_grad()
    expected.square().mean().backward()
    actual.square().mean().backward()
    for ours, theirs in (("proj.0", "in_proj"), ("proj.2", "out_proj"), ("pre_norm", "pre_norm")):
        for kind in ("weight", "bias"):
            ours_grad = projector.get_parameter(f"{ours}.{kind}").grad
            theirs_grad = hf_projector.get_parameter(f"{theirs}.{kind}").grad
            torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-4, atol=1e-7)


def test_behind_the_tower_equals_transformers(
    projector: PatchMergerProjector, reference: tuple[torch.nn.Module, dict[str, Tensor]]
) -> None:
    tower = MoonViT3D(tiny_vision_config())
    state = prefixed(reference[1], "vision_tower.")
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)
    tower.load_state_dict(state)
    pixels = torch.randn(sum(t * h * w for t, h, w in GRIDS), 588, generator=torch.Generator().manual_seed(0))
    expected = hf_image_features(reference[0], pixels, GRIDS)
    torch.testing.assert_close(projector(tower(pixels, GRIDS)), expected, rtol=0, atol=1e-5)


def test_flat_features_are_the_same_ones(projector: PatchMergerProjector) -> None:
    features = torch.randn(5, 4, 48, generator=torch.Generator().manual_seed(0))
    assert projector.of_flat(features.flatten(1)).equal(projector(features))


def test_no_tokens_give_zero_gradients(projector: PatchMergerProjector) -> None:
    check_zero_gradients(projector, projector(torch.empty(0, 4, 48)))
    check_zero_gradients(projector, projector.of_flat(None))


def check_zero_gradients(projector: PatchMergerProjector, embeddings: Tensor) -> None:
    """Every parameter has a gradient, of zeros."""
    projector.zero_grad()
    assert embeddings.shape == (0, 64)
    embeddings.sum().backward()
    for name, parameter in projector.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
