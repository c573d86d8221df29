"""One unit of an import: read piece by piece, made numbers, and streamed into its file."""

import os
from collections.abc import Callable
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from k25_train.checkpoint.files.writer import PartsWriter
from k25_train.checkpoint.manifest import FileEntry
from k25_train.convert.mapping import PlannedTensor
from k25_train.convert.names import Change
from k25_train.convert.number_formats import check_shape, is_finite, read
from k25_train.convert.units import Piece, Unit, pieces
from k25_train.errors import CheckpointError


def write_unit(
    unit: Unit, folder: Path, num_heads: int, max_elements: int, report: Callable[[int], None]
) -> FileEntry:
    """Write a unit's file into a folder, under its name when all of it is on disk.

    Args:
        unit: what to write.
        folder: of the import.
        num_heads: attention heads of the tower, by which rows are interleaved.
        max_elements: of a piece.
        report: called with bytes that were written.

    Raises CheckpointError naming file and tensor, OSError.
    """
    scratch = folder / f"{unit.file_name}.{os.uname().nodename}.{os.getpid()}"
    try:
        with PartsWriter(scratch, [each.part for each in unit.parts]) as writer:
            for each in unit.parts:
                for piece in pieces(each, max_elements):
                    values = made(piece, each.tensor, num_heads)
                    writer.write(values)
                    report(values.numel() * values.element_size())
        os.replace(scratch, folder / unit.file_name)
    finally:
        scratch.unlink(missing_ok=True)
    return writer.entry


def made(piece: Piece, tensor: PlannedTensor, num_heads: int) -> Tensor:
    """The elements of ours that a piece makes, 1-D, in the dtype of ours."""
    source = piece.segment.source
    if piece.start == 0:
        check_shape(source)
    if piece.segment.change is Change.none:
        values = read(source, piece.start, piece.stop)
    else:
        whole = read(source, 0, source.numel).view(source.shape)
        values = _changed(whole, piece.segment.change, tensor.shape, num_heads).flatten()
    if values.dtype is tensor.dtype:
        return values.contiguous()
    rounded = values.to(tensor.dtype)
    if not is_finite(rounded):
        raise CheckpointError(
            f"{source.codes.path}: {source.name} holds numbers too large for {tensor.dtype}; import it with "
            "--dtype float32"
        )
    return rounded


def interleave(rows: Tensor, num_heads: int) -> Tensor:
    """Rows [N·D, …] of heads in half-split order -> in interleaved pairs: (0, D/2), (1, D/2 + 1), …

    The inverse of transformers' `PermuteForRope` (5.23.0, `core_model_loading.py`).
    """
    half = rows.shape[0] // num_heads // 2
    return rows.unflatten(0, (num_heads, 2, half)).transpose(1, 2).reshape(rows.shape)


def resample(table: Tensor, height: int, width: int) -> Tensor:
    """Positions of a square [N², C] as a table [height, width, C], float32.

    Bicubic without corners aligned, as MoonViT resamples its own table to each image. Kimi-VL's report (2.1)
    says that SigLIP's positions are interpolated, but neither how nor to which size at the start: our choice.
    """
    edge = round(table.shape[0] ** 0.5)
    square = table.float().view(1, edge, edge, -1).permute(0, 3, 1, 2)
    return F.interpolate(square, (height, width), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)


def _changed(values: Tensor, change: Change, shape: tuple[int, ...], num_heads: int) -> Tensor:
    if change is Change.interleave:
        return interleave(values, num_heads)
    return resample(values, shape[0], shape[1])
