"""What a crash has left: every checkpoint is what its saver wrote, or what is broken is named."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from k25_train.checkpoint import folders
from k25_train.checkpoint.files.stored import StoredCheckpoint
from k25_train.checkpoint.integrity import verify
from k25_train.errors import CheckpointError
from tests.helpers.checkpoint_crashes.jobs import state_of

_EXPECTED = re.compile(rf"step_\d+(\.damaged)?|{folders.LATEST}")


@dataclass(frozen=True, slots=True)
class Found:
    """What a run that starts now would find."""

    newest: Path | None
    """The checkpoint that it resumes from."""
    damaged: Sequence[str]
    """Errors that name what is broken."""
    problems: Sequence[str]
    """What must not be."""


def look(root: Path, salts: Collection[int]) -> Found:
    """Start as a run does, and load all that it may resume from.

    Args:
        root: folder of the checkpoints.
        salts: of the jobs that saved there.
    """
    newest = folders.start_from(root)
    damaged, problems = [], []
    for folder in folders.list_checkpoints(root):
        try:
            found = load(folder)
        except CheckpointError as error:
            damaged.append(str(error))
            if folder.name not in str(error):
                problems.append(f"{folder.name} does not load, and is not named: {error}")
            continue
        if not any(_are_equal(found, state_of(salt, folders.step_of(folder))) for salt in salts):
            problems.append(f"{folder.name} loads silently, and is not what a saver wrote")
    latest = folders.latest_checkpoint(root)
    if latest is not None and not folders.is_whole(latest) and not damaged:
        problems.append(f"latest names {latest.name}, which is not whole")
    if newest is not None and latest is None and not damaged:
        problems.append("latest names nothing")
    problems += [
        f"{path.name} is left behind" for path in root.iterdir() if not _EXPECTED.fullmatch(path.name)
    ]
    return Found(newest, damaged, problems)


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, as a run reads them: verified. Raises `CheckpointError`."""
    manifest = verify(folder)
    stored = StoredCheckpoint.open(folder)
    assert stored.manifest == manifest
    return {name: stored.read(name).view(info.shape) for name, info in stored.tensors.items()}


def _are_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in expected.items()
    )
