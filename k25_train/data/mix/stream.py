"""The sequences of one source, window after window and epoch after epoch."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import floor
from typing import Protocol

import numpy as np

from k25_train.data.mix.lengths import Measured
from k25_train.data.mix.packing import Packed, pack_cut, pack_whole
from k25_train.data.mix.ragged import offsets_of, positions_of
from k25_train.data.mix.sequences import Sequences
from k25_train.data.mix.state import SourcePosition
from k25_train.data.mix.windows import Windows
from k25_train.errors import DataError

ROUNDING = 1e-9
NUM_WINDOWS_WITHOUT = 64
"""So many windows in a row without anything usable, or one whole epoch, and a source has nothing to give.
Our choice."""
MOST_SEQUENCES_TO_CARRY = 256
"""Windows of more sequences leave nothing to the next: it would save less than 0.4% of them. Our choice."""
MOST_CARRIED = 256
"""Items that are left to the next window at most, as a checkpoint has them. Our choice."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A window of a source, packed: its own documents, and those that the one before left to it."""

    epoch: int
    number: int
    left: tuple[int, ...]
    """Items that are left to the next window: those of the sequence with most padding."""
    sequences: Sequences
    num_tokens: np.ndarray
    """[S] int64: tokens of each sequence without padding."""

    def __len__(self) -> int:
        return len(self.num_tokens)


class Documents(Protocol):
    """The items of a source that are trained on, or those held out."""

    @property
    def name(self) -> str:
        """The source, as `data.sources` names it."""

    @property
    def num_items(self) -> int:
        """Of an epoch."""

    @property
    def is_cut(self) -> bool:
        """Whether documents are cut at the end of a sequence."""

    def nothing_usable(self) -> str:
        """An error's words where no item can be used."""

    def items(self, positions: np.ndarray) -> np.ndarray:
        """Items of the index at positions [0, num_items)."""

    def measure(self, items: np.ndarray, *, is_first: bool) -> Measured:
        """Documents of items [n]: none is longer than a sequence unless they are cut.

        `is_first`: in the first epoch, in which those that cannot be used are counted.
        """


class SourceStream:
    """A feed of `blend.Merge`: tells sequences ahead, and serves them."""

    def __init__(
        self, number: int, documents: Documents, windows: Windows, seq_len: int, max_epochs: float | None
    ) -> None:
        """`number`: of the source, which `take` returns."""
        self.number = number
        self._documents = documents
        self._windows = windows
        self._seq_len = seq_len
        self._max_epochs = max_epochs
        self._pack = lru_cache(maxsize=4)(self._pack_window)
        self.seek(SourcePosition())

    @property
    def name(self) -> str:
        """Of the source."""
        return self._documents.name

    @property
    def num_items(self) -> int:
        """Of an epoch."""
        return self._windows.num_items

    def seek(self, position: SourcePosition) -> None:
        """Go on from a position.

        Where the items or the length of sequences have changed since, windows are other ones: with the next
        epoch, or the next window.
        """
        epoch, window, sequence = position.epoch, position.window, position.sequence
        carried = position.carried
        if position.num_items not in (0, self._windows.num_items):
            epoch, window, sequence, carried = epoch + bool(window or sequence), 0, 0, ()
        elif position.seq_len not in (0, self._seq_len) and sequence:
            window, sequence, carried = window + 1, 0, ()
        if window >= self._windows.num_windows:
            epoch, window = epoch + 1, 0
        self._told: deque[Window] = deque()
        self._next = epoch, window, carried
        self._done = sequence
        self._is_first_told = False
        self.position = replace(
            position,
            epoch=epoch,
            window=window,
            sequence=sequence,
            carried=carried,
            num_items=self._windows.num_items,
            seq_len=self._seq_len,
        )

    def more(self) -> np.ndarray | None:
        """See `blend.Feed`."""
        for _ in range(min(self._windows.num_windows, NUM_WINDOWS_WITHOUT) + 1):
            epoch, number, carried = self._next
            limit = self._limit(epoch, number)
            if limit <= 0:
                return None
            following = (epoch, number + 1) if number + 1 < self._windows.num_windows else (epoch + 1, 0)
            window = self._pack(epoch, number, carried, is_last=self._limit(*following) <= 0)
            self._next = *following, window.left
            done, self._is_first_told = (0 if self._is_first_told else self._done), True
            self._told.append(window)
            tokens = window.num_tokens[done : floor(limit * len(window))]
            if len(tokens):
                return tokens
        raise DataError(self._documents.nothing_usable())

    def check(self) -> None:
        """Pack the window that comes first. Raises DataError if more of it than may be cannot be used."""
        if self.more() is None:
            raise DataError(f"data.sources.{self.name}: epochs={self._max_epochs} leave no sequence of it")
        self.seek(self.position)

    @property
    def mean_tokens(self) -> float:
        """Tokens per item, in the first window."""
        window = self._pack(0, 0, (), is_last=True)
        return int(window.num_tokens.sum()) / len(self._windows.items(0, 0))

    def take(self, count: int) -> np.ndarray:
        """See `blend.Feed`; `serve` gives what was taken."""
        return np.full(count, self.number, dtype=np.int64)

    def serve(self, count: int) -> Sequences:
        """The next sequences, all of them told; the position moves behind them."""
        parts: list[Sequences] = []
        position = self.position
        num_tokens = 0
        while count:
            window = self._told[0]
            begin, end = self._done, min(self._done + count, len(window))
            if begin < end:
                parts.append(window.sequences.between(begin, end))
                num_tokens += int(window.num_tokens[begin:end].sum())
                count -= end - begin
            self._done = end
            if end == len(window):
                self._told.popleft()
                self._done = 0
            position = self._behind(position, window, end)
        served = Sequences.joined(parts)
        self.position = replace(
            position,
            num_sequences=position.num_sequences + len(served.offsets) - 1,
            num_tokens=position.num_tokens + num_tokens,
            tokens_of_mix=position.tokens_of_mix + num_tokens,
        )
        return served

    def _behind(self, position: SourcePosition, window: Window, sequence: int) -> SourcePosition:
        """The position behind `sequence` sequences of a window."""
        num_windows = self._windows.num_windows
        epoch, number, part, carried = window.epoch, window.number, 0.0, position.carried
        if sequence == len(window):
            number, sequence, carried = number + 1, 0, window.left
            epoch, number = (epoch + 1, 0) if number == num_windows else (epoch, number)
        else:
            part = sequence / len(window)
        used = epoch + (number + part) / num_windows
        return replace(
            position, epoch=epoch, window=number, sequence=sequence, epochs_used=used, carried=carried
        )

    def _limit(self, epoch: int, window: int) -> float:
        """The share of a window that may be served; less than 1 in the last one of a cap, 0 behind it."""
        if self._max_epochs is None:
            return 1.0
        left = (self._max_epochs - epoch) * self._windows.num_windows - window
        # What the product of floats is off by is no sequence.
        return min(1.0, left + ROUNDING) if left > ROUNDING else 0.0

    def _pack_window(self, epoch: int, number: int, carried: tuple[int, ...], *, is_last: bool) -> Window:
        windows, documents = self._windows, self._documents
        # 1. The documents in their order.
        own = documents.items(windows.items(epoch, number))
        items = np.concatenate([own, np.array(carried, dtype=np.int64)]) if carried else own
        measured = documents.measure(items, is_first=epoch == 0)

        # 2. Sequences of them, shuffled: a long document fills many in a row.
        key = windows.key(epoch, number, "packing")
        packed = (
            pack_cut(measured.lengths, self._seq_len)
            if documents.is_cut
            else pack_whole(measured.lengths, self._seq_len, key)
        )
        order = windows.order(packed.num_sequences, epoch, number, "sequences")

        # 3. The one with most padding goes to the next window or, if there is none, comes last. So all others
        # are where they are in both cases: a cap may change while a window is served.
        left: tuple[int, ...] = ()
        if not documents.is_cut and 1 < len(order) <= MOST_SEQUENCES_TO_CARRY:
            emptiest = int(np.argmin(packed.num_tokens()))
            pieces = packed.documents[packed.offsets[emptiest] : packed.offsets[emptiest + 1]]
            order = np.append(order[order != emptiest], emptiest)
            if not is_last and len(pieces) <= MOST_CARRIED:
                left, order = tuple(items[pieces].tolist()), order[:-1]
        packed = packed.in_order(order)
        # What an epoch's first window was left is of the epoch before.
        epochs = np.full(len(items), epoch, dtype=np.int32)
        epochs[len(own) if number == 0 else len(items) :] -= 1
        sequences = _sequences_of(items, epochs, measured, packed)
        return Window(epoch, number, left, sequences, packed.num_tokens())


def serve(streams: Sequence[SourceStream], order: np.ndarray) -> Sequences:
    """The next sequences of the streams in the order of a merge: [S] int64, the number of each stream."""
    parts = []
    ranks = np.empty(len(order), dtype=np.int64)
    num_before = 0
    for stream in streams:
        own = np.flatnonzero(order == stream.number)
        if len(own):
            parts.append(stream.serve(len(own)))
            ranks[own] = num_before + np.arange(len(own))
            num_before += len(own)
    return Sequences.joined(parts).chosen(ranks)


def _sequences_of(items: np.ndarray, epochs: np.ndarray, measured: Measured, packed: Packed) -> Sequences:
    counts = np.diff(measured.vision_offsets)[packed.documents]
    grids = measured.grids[positions_of(measured.vision_offsets[:-1][packed.documents], counts)]
    return Sequences(
        items[packed.documents],
        packed.starts,
        packed.lengths,
        packed.offsets,
        offsets_of(counts),
        grids,
        epochs[packed.documents],
    )
