"""Which checkpoints of a run are sound: complete, and equal to the uninterrupted run's of that step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from k25_train.checkpoint import folders
from k25_train.checkpoint.integrity import verify
from k25_train.errors import K25Error


def sound_steps(run: Path, reference: Path, tolerance: float = 0.0) -> set[int]:
    """Steps of the checkpoints that verify, and whose tensors are the reference's."""
    found = set()
    for folder in folders.list_checkpoints(run / "checkpoints"):
        step = folders.step_of(folder)
        expected = folders.step_folder(reference / "checkpoints", step)
        if expected.is_dir() and is_whole(folder) and farthest(folder, expected, tolerance)[0] <= tolerance:
            found.add(step)
    return found


def is_whole(folder: Path) -> bool:
    """Whether the product itself takes the checkpoint for complete."""
    try:
        verify(folder)
    except (K25Error, OSError):
        return False
    return True


UNDETERMINED = "wqkv.bias"
"""Tensors that another layout need not reproduce: a bias of all keys changes no attention weight, so a third
of these has no gradient but the noise of rounding, which Adam scales to full steps."""


def farthest(folder: Path, expected: Path, tolerance: float = 0.0) -> tuple[float, str]:
    """Largest difference of a tensor, relative to its largest entry, and which one has it; infinite where
    names or sizes differ. With a tolerance, `UNDETERMINED` tensors do not count."""
    try:
        found, wanted = read_tensors(folder), read_tensors(expected)
    except (K25Error, OSError):
        return float("inf"), "what can be read"
    if found.keys() != wanted.keys():
        return float("inf"), "the set of names"
    names = [name for name in wanted if not tolerance or not name.endswith(UNDETERMINED)]
    return max(((_distance(found[name], wanted[name]), name) for name in names), default=(0.0, "nothing"))


def read_tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint by name, whole, each block compared with its checksum."""
    # Imported late, as torch is: most of the bench needs neither.
    import torch

    from k25_train.checkpoint.files.stored import StoredCheckpoint

    stored = StoredCheckpoint.open(folder)
    tensors = {name: stored.read(name).reshape(info.shape) for name, info in stored.tensors.items()}
    return tensors | {"num_updates": torch.tensor(stored.num_updates)}


def _distance(found: Any, wanted: Any) -> float:
    import torch

    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    if torch.equal(found, wanted):
        return 0.0
    scale = max(float(wanted.double().abs().max()), 1e-12)
    gap = float((found.double() - wanted.double()).abs().max()) / scale
    return gap if gap == gap else float("inf")
