"""The vision tower against transformers' independent one, and against its own rules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from k25_train.config.vision import VisionConfig
from k25_train.model.moonvit import MoonViT3D
from k25_train.model.moonvit_items import Grid, check_grids, pack_items
from k25_train.model.moonvit_positions import PositionEmbedding, bicubic_matrix, normalised, temporal_table
from tests.helpers.hf_reference import build_hf_reference, tiny_model_config, tiny_vision_config

IMAGES = [(1, 8, 4), (1, 2, 2), (1, 16, 16), (1, 4, 20), (1, 20, 32), (1, 8, 4), (1, 4, 8)]
CHUNKS = [(2, 4, 6), (3, 6, 4), (4, 2, 10), (4, 18, 2), (2, 4, 6)]
PACKED = [
    (4, 2, 10),
    (1, 8, 4),
    (2, 4, 6),
    (1, 2, 2),
    (3, 6, 4),
    (1, 8, 4),
    (1, 20, 32),
    (2, 2, 8),
    (1, 4, 8),
]
"""Images and chunks of unsorted lengths; (1, 8, 4), (2, 2, 8) and (1, 4, 8) are of one length."""


def random_pixels(grids: Sequence[Grid], seed: int = 0) -> Tensor:
    num_patches = sum(math.prod(grid) for grid in grids)
    return torch.randn(num_patches, 588, generator=torch.Generator().manual_seed(seed))


def hf_features(tower: torch.nn.Module, pixels: Tensor, grids: Sequence[Grid]) -> Tensor:
    """transformers' tower item by item; it cannot take items of different t together."""
    items = pixels.view(-1, 3, 14, 14).split([math.prod(grid) for grid in grids])
    outputs = [tower(item, grid_thw=torch.tensor([grid])) for item, grid in zip(items, grids, strict=True)]
    return torch.cat([output.pooler_output for output in outputs])


def load_tower(vision: VisionConfig, state: dict[str, Tensor]) -> MoonViT3D:
    tower = MoonViT3D(vision)
    prefix = "vision_tower."
    ours = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    ours["patch_embed.proj.weight"] = ours["patch_embed.proj.weight"].flatten(1)
    tower.load_state_dict(ours)
    return tower


@pytest.fixture(scope="module")
def towers() -> tuple[MoonViT3D, torch.nn.Module]:
    """Ours and transformers' with the same random weights."""
    config = tiny_model_config()
    hf_model, state = build_hf_reference(config)
    return load_tower(config.vision, state), hf_model.model.vision_tower


@pytest.mark.parametrize("grids", [IMAGES, CHUNKS, PACKED, *([grid] for grid in IMAGES[:5] + CHUNKS[:4])])
def test_equals_transformers(towers: tuple[MoonViT3D, torch.nn.Module], grids: list[Grid]) -> None:
    ours, reference = towers
    pixels = random_pixels(grids)
    expected = hf_features(reference, pixels, grids)
    actual = ours(pixels, grids)
    assert actual.shape == (sum(h * w // 4 for _, h, w in grids), 4, 48)
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_gradients_equal_transformers(towers: tuple[MoonViT3D, torch.nn.Module]) -> None:
    ours, reference = towers
    pixels = random_pixels(PACKED)
    expected = hf_features(reference, pixels, PACKED)
    weights = (
        torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)) / expected.numel() ** 0.5
    )
    for tower, features in ((ours, ours(pixels, PACKED)), (reference, expected)):
        tower.zero_grad()
        (features * weights).sum().backward()
    pairs = {
        "patch_embed.proj.weight": "patch_embed.proj.weight",
        "patch_embed.pos_emb.weight": "patch_embed.pos_emb.position_embeddings",
        "encoder.blocks.0.norm0.weight": "layers.0.norm1.weight",
        "encoder.blocks.2.norm1.bias": "layers.2.norm2.bias",
        "encoder.blocks.1.wo.weight": "layers.1.attn.proj.weight",
        "encoder.blocks.0.mlp.fc0.weight": "layers.0.mlp.fc1.weight",
        "encoder.final_layernorm.weight": "final_layernorm.weight",
    }
    for our_name, hf_name in pairs.items():
        ours_grad = ours.get_parameter(our_name).grad
        hf_grad = reference.get_parameter(hf_name).grad
        assert ours_grad is not None and hf_grad is not None
        torch.testing.assert_close(ours_grad, hf_grad.view_as(ours_grad), rtol=1e-4, atol=1e-5, msg=our_name)
    wqkv_grad = ours.get_parameter("encoder.blocks.1.wqkv.weight").grad
    assert wqkv_grad is not None
    # Only the values: transformers stores q and k with permuted rows.
    value_grad = reference.get_parameter("layers.1.attn.v_proj.weight").grad
    torch.testing.assert_close(wqkv_grad[2 * 48 :], value_grad, rtol=1e-4, atol=1e-5)
    query_grad = reference.get_parameter("layers.1.attn.q_proj.weight").grad
    torch.testing.assert_close(wqkv_grad[:48].norm(), query_grad.norm(), rtol=1e-4, atol=0)


def test_items_do_not_see_their_neighbours(towers: tuple[MoonViT3D, torch.nn.Module]) -> None:
    ours, _ = towers
    pixels = random_pixels(PACKED)
    pixels.requires_grad_()
    sizes = [h * w // 4 for _, h, w in PACKED]
    for item, features in enumerate(ours(pixels, PACKED).split(sizes)):
        (gradient,) = torch.autograd.grad(features.square().sum(), pixels, retain_graph=True)
        touched = [
            part.abs().sum().item() > 0 for part in gradient.split([math.prod(grid) for grid in PACKED])
        ]
        assert touched == [index == item for index in range(len(PACKED))]


def test_alone_or_packed_is_the_same(towers: tuple[MoonViT3D, torch.nn.Module]) -> None:
    ours, _ = towers
    pixels = random_pixels(PACKED)
    packed = ours(pixels, PACKED)
    alone = [
        ours(item, [grid])
        for item, grid in zip(pixels.split([math.prod(g) for g in PACKED]), PACKED, strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-5)


def test_no_items_give_zero_gradients() -> None:
    tower = MoonViT3D(tiny_vision_config())
    features = tower(torch.empty(0, 588), [])
    assert features.shape == (0, 4, 48)
    features.sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_evaluation_before_training_leaves_usable_tables() -> None:
    vision = tiny_vision_config(rope_theta=12345.0, pos_emb_height=10, pos_emb_width=10)
    tower = MoonViT3D(vision)
    grids = [(3, 14, 6)]
    with torch.inference_mode():
        tower(random_pixels(grids), grids)
    tower(random_pixels(grids), grids).sum().backward()
    assert tower.patch_embed.pos_emb.weight.grad is not None


def test_built_without_memory_and_filled_later_is_the_same(
    towers: tuple[MoonViT3D, torch.nn.Module],
) -> None:
    ours, _ = towers
    with torch.device("meta"):
        empty = MoonViT3D(ours.vision)
    empty.to_empty(device="cpu").load_state_dict(ours.state_dict())
    pixels = random_pixels(PACKED)
    torch.testing.assert_close(empty(pixels, PACKED), ours(pixels, PACKED), rtol=0, atol=0)


def test_bfloat16_stays_close_and_keeps_its_dtype(towers: tuple[MoonViT3D, torch.nn.Module]) -> None:
    ours, _ = towers
    pixels = random_pixels(PACKED)
    expected = ours(pixels, PACKED)
    low = MoonViT3D(ours.vision)
    low.load_state_dict(ours.state_dict())
    actual = low.bfloat16()(pixels, PACKED)
    assert actual.dtype == torch.bfloat16
    assert F.cosine_similarity(actual.float().flatten(), expected.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("size", [1, 2, 7, 16, 37])
def test_bicubic_matrix_is_torch_interpolate(size: int) -> None:
    table = torch.randn(16, 16, 5)
    matrix = bicubic_matrix(16, size, torch.device("cpu"))
    columns = bicubic_matrix(16, 6, torch.device("cpu"))
    actual = torch.einsum("hi,wj,ijc->hwc", matrix, columns, table)
    expected = F.interpolate(table.permute(2, 0, 1)[None], size=(size, 6), mode="bicubic")[0].permute(1, 2, 0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_oblong_position_table_is_resampled_on_both_axes() -> None:
    embedding = PositionEmbedding(tiny_vision_config(pos_emb_height=12, pos_emb_width=20))
    table = embedding.weight.detach().permute(2, 0, 1)[None]
    expected = F.interpolate(table, size=(6, 8), mode="bicubic")[0].permute(1, 2, 0).reshape(48, 48)
    torch.testing.assert_close(embedding(pack_items([(1, 6, 8)])), expected, rtol=0, atol=1e-5)


def test_frames_of_a_chunk_differ_by_the_fixed_table_alone() -> None:
    embedding = PositionEmbedding(tiny_vision_config())
    image = embedding(pack_items([(1, 4, 6)]))
    chunk = embedding(pack_items([(3, 4, 6)])).view(3, 24, 48)
    table = temporal_table(3, 48, torch.device("cpu"))
    angles = torch.arange(3.0)[:, None] / 10000 ** (torch.arange(24.0) / 24)
    torch.testing.assert_close(table, torch.cat([angles.sin(), angles.cos()], dim=1))
    torch.testing.assert_close(chunk, image + table[:, None], rtol=0, atol=1e-5)


def test_equal_lengths_share_a_segment() -> None:
    items = pack_items([(1, 8, 4), (1, 2, 2), (2, 2, 8), (1, 8, 4)])
    assert items.item_order == (1, 0, 3, 2)
    assert items.segments == ((4, 1), (32, 3))
    assert [(run.t, run.h, run.w, run.num_items) for run in items.runs] == [
        (1, 2, 2, 1),
        (1, 8, 4, 2),
        (2, 2, 8, 1),
    ]
    assert pack_items([(1, 2, 2), (1, 2, 4)]).patch_order is None


@pytest.mark.parametrize(
    ("grids", "num_patches", "message"),
    [
        ([(1, 2, 2), (5, 2, 2)], 24, r"item 1: grid \(5, 2, 2\) has t=5 .*pos_emb_time=4"),
        ([(0, 2, 2)], 0, r"item 0: .*t=0"),
        ([(1, 3, 2)], 6, r"item 0: .*h=3; it must be a positive multiple of merge_size=2"),
        ([(1, 2, 2), (1, 2, 5)], 14, r"item 1: .*w=5"),
        ([(1, 0, 2)], 0, r"item 0: .*h=0"),
        ([(1, 2, 66)], 132, r"item 0: .*w=66; positions end at rope_max_grid=64"),
        ([(1, 2, 2)], 5, r"1 items: their grids hold 4 patches, but pixels has 5 rows"),
        ([], 3, r"0 items: their grids hold 0 patches, but pixels has 3 rows"),
    ],
)
def test_bad_grids_name_item_value_and_rule(grids: list[Grid], num_patches: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_grids(grids, num_patches, tiny_vision_config())
    with pytest.raises(ValueError, match=message):
        MoonViT3D(tiny_vision_config())(torch.zeros(num_patches, 588), grids)


def test_decoded_pixels_are_normalised_as_the_release_does(towers: tuple[MoonViT3D, torch.nn.Module]) -> None:
    ours, _ = towers
    pixels = torch.arange(16 * 588).view(16, 588).to(torch.uint8)
    as_floats = (pixels.float() / 255 - 0.5) / 0.5

    assert torch.equal(normalised(pixels), as_floats)
    assert torch.equal(ours(pixels, [(1, 4, 4)]), ours(as_floats, [(1, 4, 4)]))
