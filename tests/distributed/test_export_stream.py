"""The stream of named tensors, from a trainer's modules and from its checkpoint: the same tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run

pytestmark = pytest.mark.distributed

Digests = dict[str, tuple[str, tuple[int, ...], str]]


def digests(stream: Iterable[Any]) -> Digests:
    """Name -> number format, shape and hash, in order."""
    return {
        each.name: (
            str(each.dtype),
            each.shape,
            hashlib.sha256(each.tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest(),
        )
        for each in stream
    }


def fit_and_stream(context: RankContext, arguments: Sequence[str]) -> tuple[Digests, Digests]:
    """Train; then what this rank yields, and what is gathered on the last rank, before and after packing."""
    from k25_train.export.listing import WeightFormat, released_tensors
    from k25_train.export.live import LiveTensors
    from k25_train.export.stream import as_stored
    from k25_train.metrics.report import Report
    from k25_train.training.trainer import Trainer

    run = start_run(context, arguments)
    report = Report(run.config, is_main=run.is_main, device_name=run.topology.device.type)
    with report, run.data, run.claim:
        Trainer(run, report).fit()
    tensors = list(released_tensors(run.config.model))
    live = LiveTensors(run.modules, tensors)
    gathered = list(live.gathered(run.topology.group("world"), context.world_size - 1))
    packed = as_stored(gathered, tensors, WeightFormat.int4) if gathered else []
    return digests(live), digests(gathered) | digests(packed)


def load_and_stream(context: RankContext, arguments: Sequence[str], checkpoint: Path) -> Digests:
    """Load a checkpoint of another layout; what this rank yields."""
    from k25_train.checkpoint.loading import load
    from k25_train.export.listing import released_tensors
    from k25_train.export.live import LiveTensors

    run = start_run(context, arguments)
    with run.data, run.claim:
        load(checkpoint, run.config, run.modules, optimizer=None)
    return digests(LiveTensors(run.modules, list(released_tensors(run.config.model))))


def test_modules_and_checkpoint_give_the_same_tensors(data: Path, tmp_path: Path) -> None:
    from k25_train.checkpoint.files.stored import StoredCheckpoint
    from k25_train.compose.resolve import compose
    from k25_train.export.listing import WeightFormat, released_tensors
    from k25_train.export.stream import as_stored, stored_tensors

    short = "train.steps=2 checkpoint.interval=2 optim.warmup=1 optim.decay=1 train.eval_sequences=4"
    more = ("train.dtype=bfloat16", *short.split())
    arguments = overrides(data, tmp_path / "run", *more, *layout(pp=2, vpp=2, ep=2, cp=2))
    by_rank = run_ranks(fit_and_stream, 4, arguments, timeout_s=240.0)

    model = compose(arguments).model
    tensors = list(released_tensors(model))
    path = tmp_path / "run/checkpoints/step_2"
    checkpoint = StoredCheckpoint.open(path)
    expected = digests(stored_tensors(checkpoint, tensors))
    names = [name for own, _ in by_rank for name in own]
    assert len(names) == len(set(names)) == len(expected)
    assert {name: value for own, _ in by_rank for name, value in own.items()} == expected
    # Every rank has about its share of the tensors.
    assert min(len(own) for own, _ in by_rank) > len(expected) / 8
    packed = digests(as_stored(stored_tensors(checkpoint, tensors), tensors, WeightFormat.int4))
    assert [bool(gathered) for _, gathered in by_rank] == [False, False, False, True]
    assert by_rank[-1][1] == expected | packed
    assert list(by_rank[-1][1])[: len(expected)] == list(expected)

    # Loaded into one rank, with the tower in the first stage.
    other = overrides(data, tmp_path / "other", *more, *layout(), "dep.mode=coupled")
    assert run_ranks(load_and_stream, 1, other, path) == [expected]
