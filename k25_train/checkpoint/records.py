"""What a save is told, and what it tells: contents, files, figures, and the checkpoint that comes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from k25_train.checkpoint.manifest import FileEntry, Manifest
from k25_train.checkpoint.storage.kinds import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a checkpoint has apart from tensors; that of rank 0 counts."""

    manifest: Manifest
    """All but its files, and what is found to be unsound later."""
    texts: Mapping[str, str]
    """Small files by name, the run's configuration among them."""


@dataclass(frozen=True, slots=True)
class Written:
    """A file that a thread has written."""

    name: str
    """In the folder of the checkpoint."""
    entry: FileEntry
    """As the manifest lists it."""
    not_finite: Sequence[str]
    """Tensors with an element that is not finite, some of them."""
    seconds: float
    """Since the save was started."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a save has cost; zeros on all ranks but the first, and until all have written."""

    num_bytes: int = 0
    """Of all files of tensors."""
    write_s: float = 0.0
    """From the start until the slowest rank had written."""


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint that counts."""

    folder: Place
    """Where it is."""
    why_unsound: str
    """What is wrong with its state; empty if it is sound."""
