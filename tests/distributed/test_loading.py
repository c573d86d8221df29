"""Checkpoints load into any layout, bit by bit as they were saved, and say what does not fit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.assembled import Built, build
from tests.helpers.pieces_on_disk import write
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout

pytestmark = pytest.mark.distributed

STEP = 7
SHARE_MULTIPLE = 64


def value_of(name: str, numel: int) -> Tensor:
    """What every element of a tensor is set to: its own number, and different in each tensor."""
    offset = sum(map(ord, name)) % 89
    return (torch.arange(numel) % 97 + offset).float()


def save_known(context: RankContext, arguments: Sequence[str], folder: str) -> None:
    """Save a state whose every element is known."""
    built = prepared(context, arguments)
    from k25_train.checkpoint.pieces import pieces

    for piece in pieces(built.modules, built.optimizer):
        part = piece.part
        piece.tensor.copy_(value_of(part.name, part.stop)[part.start :])
    write(built, Path(folder), num_updates=STEP - 1)


def load_and_compare(
    context: RankContext, arguments: Sequence[str], folder: str, trains: bool
) -> tuple[int, set[int], list[str], int]:
    """Load it: the step, the number of updates, tensors that are not as saved, bytes asked of its files."""
    built = prepared(context, arguments)
    from k25_train.checkpoint.files.access import _LocalFile

    asked: list[int] = []
    read_into = _LocalFile.read_into

    def counting(self: Any, offset: int, buffer: Any) -> None:
        asked.append(len(buffer))
        read_into(self, offset, buffer)

    _LocalFile.read_into = counting
    from k25_train.checkpoint.loading import load
    from k25_train.checkpoint.pieces import pieces

    step = load(Path(folder), built.config, built.modules, built.optimizer if trains else None)
    wrong = [name for name, start, found in held(built) if not torch.equal(found, known(name, start, found))]
    if trains:
        wrong += [
            piece.part.entry
            for piece in pieces(built.modules, built.optimizer)
            if not torch.equal(piece.tensor, known(piece.part.name, piece.part.start, piece.tensor))
        ]
    counts = {part.num_updates for part in built.optimizer.chained_optimizers if part.shards()}
    return step, counts, wrong, sum(asked)


def prepared(context: RankContext, arguments: Sequence[str]) -> Built:
    """Built with small shares and little staging memory, so that all code has something to do."""
    built = build(context, arguments)
    from k25_train.checkpoint import loading, pieces

    pieces.SHARE_MULTIPLE = SHARE_MULTIPLE
    loading.LOAD_STAGING_BYTES = 4096
    return built


def held(built: Built) -> list[tuple[str, int, Tensor]]:
    """Everything that the modules have: name, first element in the whole tensor, elements."""
    from k25_train.checkpoint.whole import held_tensors

    return [(each.name, each.start, each.flat) for module in built.modules for each in held_tensors(module)]


def known(name: str, start: int, like: Tensor) -> Tensor:
    return value_of(name, start + like.numel())[start:].to(like.dtype)


SMOKE = (
    "checkpoint.writers=1",
    *layout(pp=2, vpp=2, ep=2, dp=2),
    "train.dtype=bfloat16",
    "optim.offload=cpu",
)
ALONE = ("checkpoint.writers=1", *layout(), "train.dtype=bfloat16", "optim.offload=none")


def evaluating(arguments: Sequence[str]) -> list[str]:
    """The same on two ranks that have nothing but weights, of another dtype."""
    return [*arguments[:-3], "cluster.gpus_per_node=2", "train.dtype=float32", "dep.mode=coupled"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of four ranks."""
    folder = str(tmp_path_factory.mktemp("saved") / f"step_{STEP}")
    run_ranks(save_known, 4, SMOKE, folder)
    return folder


def planned_bytes(_context: RankContext, writer: Sequence[str], reader: Sequence[str], trains: bool) -> int:
    """What all ranks ask of files by the plans of the dry run's ranks."""
    from parallel.megatron.platform import use_platform

    use_platform("meta")
    from k25_train.checkpoint import pieces
    from tests.helpers.dry_parts import dry_parts
    from tests.helpers.virtual_checkpoint import asked_by, written_by

    pieces.SHARE_MULTIPLE = SHARE_MULTIPLE
    checkpoint = written_by(dry_parts(writer, trains=True), num_writers=2)
    parts = dry_parts(reader, trains=trains)
    return checkpoint.header_bytes + sum(asked_by(checkpoint, each, lambda _: True) for each in parts)


@pytest.mark.parametrize(
    ("reader", "num_ranks", "trains"),
    [(ALONE, 1, True), (SMOKE, 4, True), (evaluating(ALONE), 2, False)],
    ids=["one process", "same ranks", "evaluation of another dtype"],
)
def test_every_element_comes_back_and_is_read_as_planned(
    reader: Sequence[str], num_ranks: int, trains: bool, saved: str
) -> None:
    found = run_ranks(load_and_compare, num_ranks, reader, saved, trains)
    for step, counts, wrong, _ in found:
        assert (step, counts, wrong) == (STEP, {STEP - 1 if trains else 0}, [])
    if trains:
        (planned,) = run_ranks(planned_bytes, 1, SMOKE, reader, trains)
        # Parts are in another order in files, and so the texts of headers have other lengths.
        assert sum(asked for *_, asked in found) == pytest.approx(planned, rel=1e-3)


def errors_of_other_models(context: RankContext, arguments: Sequence[str], folder: str) -> list[str]:
    """What is said where the model lacks a tensor of the checkpoint, or has one in another shape."""
    built = prepared(context, arguments)
    from dataclasses import replace

    from k25_train.checkpoint.loading import open_together, read_pieces
    from k25_train.checkpoint.manifest import read_manifest
    from k25_train.checkpoint.pieces import Piece, pieces
    from k25_train.errors import CheckpointError

    stored = open_together(Path(folder), read_manifest(Path(folder)), built.config.checkpoint)
    (norm, *others) = sorted(pieces(built.modules, built.optimizer), key=lambda piece: piece.part.name)
    other = Piece(replace(norm.part, shape=(*norm.part.shape, 1)), norm.tensor)
    errors = []
    for wanted in (others, [other, *others]):
        with pytest.raises(CheckpointError) as error:
            read_pieces(stored, wanted)
        errors.append(str(error.value).removeprefix(f"{folder} does not fit the configured model:\n  "))
    return errors


def test_what_does_not_fit_is_named_with_both_shapes(saved: str) -> None:
    ((left, shape),) = run_ranks(errors_of_other_models, 1, ALONE, saved)
    name = "language_model.decoder.final_layernorm.weight"
    assert left == f"{name}: in the checkpoint, not in the model"
    assert shape == f"{name}: [64] in the checkpoint, [64, 1] in the model"
