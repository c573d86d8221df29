"""How a rank fills its pieces: in batches of bounded size, from tensors that fit the model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from k25_train.checkpoint import loading
from k25_train.checkpoint.files.parts import Part, whole
from k25_train.checkpoint.files.stored import StoredCheckpoint
from k25_train.checkpoint.files.writer import write_parts
from k25_train.checkpoint.manifest import MANIFEST, Manifest
from k25_train.checkpoint.pieces import Piece

SHAPES = {"a": (5, 40), "b": (7,), "c": (3, 100), "empty": (0,)}


def values(name: str) -> Tensor:
    """Elements of a tensor [n], as they are stored: bfloat16 but for `b`."""
    numel = torch.Size(SHAPES[name]).numel()
    return torch.arange(numel).to(torch.float32 if name == "b" else torch.bfloat16) + len(name)


@pytest.fixture
def stored(tmp_path: Path) -> StoredCheckpoint:
    parts = [(whole(name, values(name).dtype, shape), values(name)) for name, shape in SHAPES.items()]
    entry = write_parts(tmp_path / "rank_00000_0.safetensors", parts)
    manifest = Manifest(step=1, files={"rank_00000_0.safetensors": entry}, facts={}, num_updates=1)
    (tmp_path / MANIFEST).write_text(manifest.to_text())
    return StoredCheckpoint.open(tmp_path)


def piece(name: str, start: int, stop: int, dtype: torch.dtype, shape: tuple[int, ...] = ()) -> Piece:
    part = Part(name, dtype, shape or SHAPES[name], start, stop)
    return Piece(part, torch.full((stop - start,), -1, dtype=dtype))


@pytest.mark.parametrize("most_bytes", [64, 128, 200, 1000, 10_000])
def test_batches_have_every_element_once_and_fit(stored: StoredCheckpoint, most_bytes: int) -> None:
    wanted = [
        piece("a", 3, 200, torch.float32),
        piece("b", 0, 7, torch.float32),
        piece("c", 7, 8, torch.float32),
    ]
    batches = list(loading.batches(stored, wanted, most_bytes))
    found = [(each.part.name, index) for batch in batches for each in batch for index in _elements(each)]
    assert found == [(each.part.name, index) for each in wanted for index in _elements(each)]
    for batch in batches:
        sizes = [each.part.numel * stored.tensors[each.part.name].dtype.itemsize for each in batch]
        # All but the last begin at multiples of 64 bytes.
        assert sum(-(-size // 64) * 64 for size in sizes[:-1]) + sizes[-1] <= most_bytes


def _elements(each: Piece) -> range:
    assert each.tensor.numel() == each.part.numel
    return range(each.part.start, each.part.stop)


@pytest.mark.parametrize("staging", [64, 4096])
def test_pieces_are_filled_straight_or_converted(
    stored: StoredCheckpoint, staging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "LOAD_STAGING_BYTES", staging)
    straight = piece("c", 20, 300, torch.bfloat16)
    converted = [piece("a", 1, 199, torch.float32), piece("b", 2, 7, torch.bfloat16)]
    assert loading.divided(stored, [straight, *converted]) == ([straight], converted)
    loading.fill(stored, [converted[0], straight, converted[1]])
    for each in (straight, *converted):
        expected = values(each.part.name)[each.part.start : each.part.stop]
        assert torch.equal(each.tensor, expected.to(each.tensor.dtype)), each.part.name


def test_tensors_that_do_not_fit_are_named_with_both_shapes(stored: StoredCheckpoint) -> None:
    wanted = [
        piece("a", 0, 9, torch.float32, (40, 5)),
        piece("d", 0, 1, torch.float32, (2,)),
        piece("b", 0, 7, torch.float32),
    ]
    lines = loading.misfits(stored, wanted)
    assert lines == [
        "a: [5, 40] in the checkpoint, [40, 5] in the model",
        "d: not in the checkpoint, [2] in the model",
    ]
