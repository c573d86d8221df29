"""Where saves go: the place that all nodes share, or the nodes' own disks (`local/saving.py`)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from k25_train.checkpoint.pieces import Piece
from k25_train.checkpoint.records import Contents
from k25_train.checkpoint.saving import Saving
from k25_train.checkpoint.snapshot import Snapshot
from k25_train.checkpoint.storage.kinds import Place


class Destination(Protocol):
    """Where a save goes."""

    def texts(self, own: Mapping[str, str]) -> Mapping[str, str]:
        """The small files of a save; called by every rank."""

    def start(
        self,
        contents: Contents,
        snapshot: Snapshot,
        pieces: Callable[[], Sequence[Piece]],
        num_writers: int,
    ) -> Saving:
        """Start it, as `Saving` does."""


class SharedPlace:
    """The place that all nodes share."""

    def __init__(self, root: Place) -> None:
        self._root = root

    def texts(self, own: Mapping[str, str]) -> Mapping[str, str]:
        """Rank 0 writes its own; the others' are not read."""
        return own

    def start(
        self,
        contents: Contents,
        snapshot: Snapshot,
        pieces: Callable[[], Sequence[Piece]],
        num_writers: int,
    ) -> Saving:
        """Start a save there."""
        return Saving(self._root, contents, snapshot, pieces, num_writers)
