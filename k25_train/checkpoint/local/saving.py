"""One save to the nodes' own disks: as a shared one, but every node keeps the files of its own ranks."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import override

import torch.distributed as dist

from k25_train.checkpoint.agreement import gather_from_ranks, on_every_rank, on_first_rank
from k25_train.checkpoint.background import Background
from k25_train.checkpoint.failed_save import drop
from k25_train.checkpoint.finite import why_not_finite
from k25_train.checkpoint.local.store import LocalStore, Origin
from k25_train.checkpoint.manifest import Manifest
from k25_train.checkpoint.pieces import Piece
from k25_train.checkpoint.records import Committed, Contents, Figures
from k25_train.checkpoint.saving import Saving
from k25_train.checkpoint.snapshot import Snapshot
from k25_train.checkpoint.storage.kinds import Place


@dataclass(frozen=True, slots=True)
class LocalPlace:
    """Where a save on the nodes' disks goes."""

    store: LocalStore
    """Of this rank's node."""
    origin: Origin
    """Which save it is."""

    @property
    def leads(self) -> bool:
        """Whether this rank changes the folders of its node."""
        return dist.get_rank() == self.store.ranks[0]

    def texts(self, own: Mapping[str, str]) -> Mapping[str, str]:
        """Every node has those of rank 0."""
        return on_first_rank(lambda: own)

    def start(
        self,
        contents: Contents,
        snapshot: Snapshot,
        pieces: Callable[[], Sequence[Piece]],
        num_writers: int,
    ) -> "LocalSaving":
        """Start a save there."""
        return LocalSaving(self, contents, snapshot, pieces, num_writers)


class LocalSaving(Saving):
    """A save in progress. Nothing comes of one whose state is not sound."""

    is_local = True

    def __init__(
        self,
        place: LocalPlace,
        contents: Contents,
        snapshot: Snapshot,
        pieces: Callable[[], Sequence[Piece]],
        num_writers: int,
    ) -> None:
        """Start it, as a `Saving`; the texts of `contents` are those of every rank here."""
        self._place = place
        super().__init__(place.store.root, contents, snapshot, pieces, num_writers)

    @override
    def _prepare(self) -> Place:
        store = self._place.store
        on_every_rank(lambda: store.prepare(self.step) if self._place.leads else None)
        return store.partial(self.step)

    @override
    def _end_writing(self, why_unsound: str) -> Background[Committed]:
        by_rank = gather_from_ranks(self._written)
        written = [each for of_rank in by_rank for each in of_rank]
        if dist.get_rank() == 0:
            num_bytes = sum(each.entry.num_bytes for each in written)
            self.figures = Figures(num_bytes, max(each.seconds for each in written))
        reasons = (why_unsound, why_not_finite(each.not_finite for each in written))
        # Threads ask nothing of the process group.
        why, leads = "; ".join(filter(None, reasons)), self._place.leads
        if why:
            return Background("checkpoint-drop", partial(self._refuse, why, leads=leads))
        if not leads:
            return Background("checkpoint-commit", lambda: Committed(self._folder, ""))
        files = {each.name: each.entry for rank in self._place.store.ranks for each in by_rank[rank]}
        manifest = dataclasses.replace(self._contents.manifest, files=files)
        return Background("checkpoint-commit", partial(self._publish, manifest))

    @override
    def _publish(self, manifest: Manifest) -> Committed:
        place = self._place
        return Committed(place.store.commit(manifest, self._contents.texts, place.origin), "")

    def _refuse(self, why: str, *, leads: bool) -> Committed:
        if leads:
            drop(self._folder)
        return Committed(self._folder, why)

    @override
    def _result(self, commit: Background[Committed]) -> Committed:
        # A node that fails is one that all know of.
        on_every_rank(commit.result)
        return commit.result()

    @override
    def _drop(self) -> None:
        on_every_rank(lambda: drop(self._folder) if self._place.leads else None)
