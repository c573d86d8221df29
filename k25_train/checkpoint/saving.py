"""One save, from the copy of the state to the name of the checkpoint, with training going on meanwhile.

```
 every rank   copies its pieces │ threads look at them, hash, write │
 rank 0                         │                                   │ verifies, writes the manifest, renames
          start ────────────────┴─────────────────────────── advance ────────────────────────────── advance
```

All ranks call `advance` at the same training step: when none has anything left to do, or one has failed. What
fails on one fails on all, and costs nothing but this save.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from k25_train.checkpoint import folders
from k25_train.checkpoint.agreement import on_every_rank, on_first_rank
from k25_train.checkpoint.background import Background
from k25_train.checkpoint.failed_save import check_writable, drop, not_written
from k25_train.checkpoint.files.parts import Part
from k25_train.checkpoint.files.writer import PartsWriter, even_shares
from k25_train.checkpoint.finite import MOST_NAMED, is_finite, why_not_finite
from k25_train.checkpoint.manifest import Manifest
from k25_train.checkpoint.publish import publish
from k25_train.checkpoint.records import Committed, Contents, Figures, Written
from k25_train.checkpoint.snapshot import Copied, Snapshot
from k25_train.checkpoint.storage.kinds import Place
from k25_train.errors import CheckpointError
from k25_train.units import MIB

if TYPE_CHECKING:
    from k25_train.checkpoint.pieces import Piece

_PIECE_BYTES = 4 * MIB
"""What is looked at, hashed and written at a time: a cache has it meanwhile."""


class Saving:
    """A save in progress. Every rank has it, and calls its methods together; properties are a rank's own."""

    is_local = False
    """Whether every node keeps the files of its own ranks."""

    def __init__(
        self,
        root: Place,
        contents: Contents,
        snapshot: Snapshot,
        pieces: Callable[[], Sequence["Piece"]],
        num_writers: int,
    ) -> None:
        """Start to copy and to write; the next update has to wait for the copies (`Snapshot.wait_to_update`).

        Args:
            root: folder of the run's checkpoints.
            contents: what is not in `pieces`.
            snapshot: has room for them, and no other save uses it.
            pieces: finds what this rank writes.
            num_writers: files, and threads, of each rank.

        Raises `CheckpointError`, on every rank, if any cannot start.
        """
        self.step = contents.manifest.step
        self.figures = Figures()
        self._root, self._contents = root, contents
        self._started_s = time.monotonic()
        self._is_cancelled = threading.Event()
        self._writers: list[Background[Written]] = []
        self._commit: Background[Committed] | None = None
        self._may_commit = threading.Event()
        self._folder = root / f"step_{self.step}"
        self._is_prepared = False
        """Whether `_folder` is this save's own; before that, it may be a checkpoint's."""
        with self._failing_together():
            self._folder = self._prepare()
            self._is_prepared = True
            on_every_rank(lambda: self._start(snapshot.take(pieces()), num_writers))

    @property
    def is_busy(self) -> bool:
        """Whether this rank has something left to do before `advance`."""
        return not all(each.is_done for each in self._threads)

    @property
    def has_failed(self) -> bool:
        """Whether this rank has failed: `advance` need not be put off, and raises."""
        return any(each.has_failed for each in self._threads)

    @property
    def is_written(self) -> bool:
        """Whether all ranks have written, and what is left is the checkpoint's name."""
        return self._commit is not None

    def advance(
        self, why_unsound: str = "", *, gives_up: bool = False, holds_back: bool = False
    ) -> "Committed | None":
        """Go on, when no rank is busy or one has failed; otherwise wait. Returns the checkpoint at the end.

        Args:
            why_unsound: what was found to be wrong with the state; counts until all have written.
            gives_up: whether another rank has failed, so that this one need not write to the end.
            holds_back: whether what is written gets its name when the save goes on again, not before.

        Raises `CheckpointError` with rank, file, cause and remedy, on every rank, if any has failed.
        """
        if gives_up:
            self._is_cancelled.set()
        with self._failing_together():
            if self._commit is None:
                self._commit = self._end_writing(why_unsound)
                if not holds_back:
                    self._may_commit.set()
                return None
            self._may_commit.set()
            return self._result(self._commit)

    def wait(self) -> None:
        """Wait until this rank is not busy."""
        if self.is_written:
            self._may_commit.set()
        for thread in self._threads:
            with contextlib.suppress(Exception):
                thread.result()

    def abandon(self) -> None:
        """Have this rank's threads write no more, since its process is about to end; asks no other rank."""
        self._is_cancelled.set()

    @property
    def _threads(self) -> "Sequence[Background[Written] | Background[Committed]]":
        return self._writers if self._commit is None else [self._commit]

    def _prepare(self) -> Place:
        """An empty folder for the files, which all ranks see."""
        return on_first_rank(lambda: folders.prepare_partial(self._root, self.step))

    def _result(self, commit: "Background[Committed]") -> "Committed":
        """The checkpoint, on every rank."""
        return on_first_rank(commit.result)

    def _drop(self) -> None:
        """Remove what was written."""
        on_first_rank(lambda: drop(self._folder))

    def _start(self, copied: Copied, num_writers: int) -> None:
        """Write this rank's files, a thread each."""
        rank = dist.get_rank()
        check_writable(self._folder)
        for index, share in enumerate(even_shares(copied.parts, num_writers)):
            name = f"rank_{rank:05d}_{index}.safetensors"
            write = partial(self._write, self._folder / name, share, copied)
            self._writers.append(Background(f"checkpoint-{index}", write))

    def _write(self, path: Place, share: Sequence[tuple[Part, Tensor]], copied: Copied) -> Written:
        """One file, in a thread of its own."""
        copied.wait()
        not_finite: set[str] = set()
        try:
            with PartsWriter(path, [part for part, _ in share]) as writer:
                for name, piece in _in_pieces(share):
                    if self._is_cancelled.is_set():
                        raise _CancelledError
                    if not is_finite(piece):
                        not_finite.add(name)
                    writer.write(piece)
        except OSError as error:
            # Its text then has the file. This rank's other threads need not go on.
            error.filename = error.filename or str(path)
            self._is_cancelled.set()
            raise
        return Written(
            path.name, writer.entry, sorted(not_finite)[:MOST_NAMED], time.monotonic() - self._started_s
        )

    def _end_writing(self, why_unsound: str) -> "Background[Committed]":
        """Gather what all ranks have written, and have rank 0 make a checkpoint of it."""
        written = [each for of_rank in on_every_rank(self._written) for each in of_rank]
        if dist.get_rank():
            return Background("checkpoint-commit", lambda: Committed(self._folder, ""))
        self.figures = Figures(
            sum(each.entry.num_bytes for each in written), max(each.seconds for each in written)
        )
        own = self._contents.manifest
        reasons = (own.why_unsound, why_unsound, why_not_finite(each.not_finite for each in written))
        files = {each.name: each.entry for each in written}
        manifest = replace(own, files=files, why_unsound="; ".join(filter(None, reasons)))
        return Background("checkpoint-commit", partial(self._publish, manifest))

    def _publish(self, manifest: Manifest) -> "Committed":
        self._may_commit.wait()
        place = publish(self._root, self._folder, manifest, self._contents.texts)
        return Committed(place, manifest.why_unsound)

    def _written(self) -> list[Written]:
        """What this rank has written; raises what kept it from that, unless it was another rank's failure."""
        written = []
        for thread in self._writers:
            with contextlib.suppress(_CancelledError):
                written.append(thread.result())
        return written

    @contextlib.contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Within: what fails on all ranks leaves nothing behind, and says what is left."""
        try:
            yield
        except (OSError, CheckpointError) as error:
            self._is_cancelled.set()
            # A rank whose file system has failed may not be able to look: one does, for all.
            told = on_first_rank(partial(not_written, self._root, self._folder, error))
            # A file that is still written would keep the folder from going.
            on_every_rank(self.wait)
            if self._is_prepared:
                # It would keep a full disk full, and the run from starting again there.
                self._drop()
            raise CheckpointError(told) from error


class _CancelledError(Exception):
    """Another file of the save has failed."""


def _in_pieces(share: Sequence[tuple[Part, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The elements of parts, some at a time, with the names of their tensors."""
    for part, tensor in share:
        for piece in tensor.split(_PIECE_BYTES // part.dtype.itemsize):
            yield part.name, piece
