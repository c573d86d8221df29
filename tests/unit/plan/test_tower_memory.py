"""What the tower keeps of a patch, as planned, against what autograd saves."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from k25_train.compose.resolve import compose
from k25_train.config.basics import DType
from k25_train.config.cluster import Device
from k25_train.config.vision import VisionConfig
from k25_train.model.moonvit import MoonViT3D
from k25_train.model.projector import PatchMergerProjector
from k25_train.plan.memory.tower import patch_bytes

DTYPES = {torch.float32: DType.float32, torch.bfloat16: DType.bfloat16}
GRID = (1, 8, 8)
NUM_PATCHES = 64


def saved_bytes(vision: VisionConfig, dtype: torch.dtype, *, with_projector: bool) -> int:
    """Bytes that a forward pass over one item keeps, each storage once, without weights and without the table
    by which positions are resampled."""
    tower, projector = MoonViT3D(vision).to(dtype), PatchMergerProjector(vision, 128).to(dtype)
    own = {each.untyped_storage().data_ptr() for each in (*tower.parameters(), *projector.parameters())}
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        features = tower(torch.randn(NUM_PATCHES, 588), [GRID])
        # Its result has to live until all is counted, or its memory would be another tensor's.
        kept = projector(features) if with_projector else features
    table = (GRID[1], vision.pos_emb_height)
    found = sum(each.untyped_storage().nbytes() for each in storages.values() if each.shape[-2:] != table)
    del kept
    return found


@pytest.mark.parametrize("with_projector", [True, False], ids=["projector", "tower alone"])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_patch_takes_what_is_planned(dtype: torch.dtype, num_layers: int, with_projector: bool) -> None:
    vision = replace(compose(["experiment=smoke"]).model.vision, num_layers=num_layers)
    planned = patch_bytes(vision, DTYPES[dtype], Device.cpu, has_projector=with_projector)
    assert saved_bytes(vision, dtype, with_projector=with_projector) == NUM_PATCHES * planned.kept


def test_a_patch_of_the_real_tower() -> None:
    vision = compose(["experiment=k25_pretrain_4k"]).model.vision
    on_cpu, each = (
        patch_bytes(vision, DType.bfloat16, device, has_projector=True)
        for device in (Device.cpu, Device.cuda)
    )
    assert on_cpu.block == 42_632
    assert each.block == on_cpu.block + 4 * 2 - 2 * vision.hidden_size, "statistics; joined by one call"
    assert 1.10e6 < each.kept < 1.11e6, "16,384 of them 18 GB"
    assert 60e3 < each.inputs < 61e3, "16,384 of them 1 GB"
