"""Shares of a micro-batch: which pieces of its documents which rank gets. Pure, and the same on every rank.

Each rank holds as many tokens as the others, so that everything but attention takes equally long. Attention's
work is by pairs of a token and an earlier one of its document, so that a long document has most of it, and
its end more than its beginning; and by keys, since keys and values are made from latents on each rank that
attends to them: a piece costs as much as the document is long up to its end, whatever its own length. Hence:

1. A document with more work than a part of a rank's share is cut for k ranks in 2k pieces, of which a rank
   gets one from the beginning with the one as far from the end, so that all k have the same. With one
   document, that is zig-zag over all ranks.
2. The others stay whole. From the longest to the shortest, each goes to the rank with the least work that has
   room for its tokens.
3. What fits nowhere is cut where room ends. These are the shortest documents, so that little work is uneven.
   Padding has no work, and takes the room that is left.

The finer the parts in 1, the more even, and the more keys. Of several sizes, the one is taken with which the
rank with most work has least, and zig-zag through the whole micro-batch where that is better still. Source:
not disclosed, our choice; to cut documents instead of the sequence is per-document sharding of WLB-LLM (arXiv
2503.17924).

    documents   |-------- a --------|-- b --|- c -|pad|        2 ranks
    rank 0      a0          a3        b                       a = a0 a1 a2 a3
    rank 1         a1    a2                   c     pad
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from parallel.context.piece import Piece

MIN_PIECE_TOKENS = 16
"""Tokens of the smallest piece that a document is cut into for balance: rows of a matrix product's tile. Our
choice."""
PARTS = (1, 2, 4, 8, 16, 64)
"""Parts of a rank's share of the work; a document with more than one of these is cut. Our choice."""
EVEN_ENOUGH = 1.01
"""Work of the rank that has most, in shares, with which no finer parts are tried. Our choice."""
NEARLY = 0.9
"""Room that a rank needs to get one of several parts of a document, in even parts. Our choice."""

type Pieces = tuple[tuple[Piece, ...], ...]
"""[rank] -> its pieces, by document, then by token."""


def share_documents(lengths: tuple[int, ...], padding: frozenset[int], num_ranks: int) -> Pieces:
    """Share documents of these lengths, of which those at `padding` are padding.

    Raises ValueError if their tokens are no multiple of the ranks.
    """
    if sum(lengths) % num_ranks:
        raise ValueError(f"{sum(lengths)} tokens cannot be shared evenly by {num_ranks} ranks")
    return min(_ways(lengths, padding, num_ranks), key=lambda way: max(way.work)).pieces


class _Way(NamedTuple):
    """A way to share documents."""

    pieces: Pieces
    work: list[int]
    """[rank] -> its work; padding has none."""


def _ways(lengths: tuple[int, ...], padding: frozenset[int], num_ranks: int) -> Iterator[_Way]:
    """Ways to share the documents, until one is even enough."""
    whole = [Piece(number, 0, length) for number, length in enumerate(lengths)]
    documents = sorted((each for each in whole if each.document not in padding), key=lambda each: -each.stop)
    work = [each.work for each in documents]
    tried: list[int] = []
    for parts in PARTS:
        most_work = max(sum(work) // num_ranks // parts, 1)
        numbers = [_num_parts(*each, most_work, num_ranks) for each in zip(documents, work, strict=True)]
        if numbers == tried:
            continue
        tried, shares = numbers, _Shares([sum(lengths) // num_ranks] * num_ranks)
        for document, num_parts in zip(documents, numbers, strict=True):
            shares.place(document, num_parts)
        for each in sorted(padding):
            shares.fill(whole[each])
        way = shares.way(padding)
        yield way
        if max(way.work) * num_ranks <= EVEN_ENOUGH * sum(way.work):
            return
    yield _zig_zag(whole, num_ranks, padding)


def _num_parts(document: Piece, work: int, most_work: int, num_ranks: int) -> int:
    """How many ranks a document is cut for, so that each has no more than so much of its work."""
    largest = max(document.stop // (2 * MIN_PIECE_TOKENS), 1)
    return min(-(-work // most_work), num_ranks, largest)


def _zig_zag(whole: Sequence[Piece], num_ranks: int, padding: frozenset[int]) -> _Way:
    """All documents as one sequence, in pieces from both ends."""
    first = sum(each.stop for each in whole) // num_ranks
    turns = _Shares([first // 2] * num_ranks + [first - first // 2] * num_ranks)
    turn = 0
    for document in whole:
        while document.num_tokens:
            turn += not turns.room[turn]
            document = turns.take(turn, document)
    shares = _Shares([0] * num_ranks)
    for number, pieces in enumerate(turns.pieces):
        shares.pieces[min(number, 2 * num_ranks - 1 - number)] += pieces
    return shares.way(padding)


class _Shares:
    """The ranks' shares in the making."""

    def __init__(self, room: list[int]) -> None:
        self.pieces: list[list[Piece]] = [[] for _ in room]
        self.room = room
        self._work = [0] * len(room)
        self._least = [(0, rank) for rank in range(len(room))]
        """(Work, rank) of all ranks, a heap."""

    def place(self, document: Piece, num_parts: int) -> None:
        """A document on the ranks with the least work that have room for it: whole on one, or in pieces from
        both ends on several. Wherever there is room if it fits nowhere."""
        # 1. The ranks.
        needed = document.stop * NEARLY / num_parts if num_parts > 1 else document.stop
        ranks, passed = list[int](), list[int]()
        while self._least and len(ranks) < num_parts:
            _, rank = heapq.heappop(self._least)
            (ranks if self.room[rank] >= needed else passed).append(rank)
        sizes = _sizes(document.stop, [self.room[rank] for rank in ranks])
        # 2. Pieces from the beginning, then those from the end, which meet in the middle.
        if len(ranks) < num_parts or not sizes:
            self.fill(document)
            return
        for rank, size in zip(ranks, sizes, strict=True):
            document = self.take(rank, document, size - size // 2)
        for rank, size in zip(reversed(ranks), reversed(sizes), strict=True):
            document = self.take(rank, document, size // 2)
        for rank in (*ranks, *passed):
            heapq.heappush(self._least, (self._work[rank], rank))

    def fill(self, piece: Piece) -> None:
        """A piece wherever there is room, most room first."""
        while piece.num_tokens:
            piece = self.take(max(range(len(self.room)), key=lambda each: (self.room[each], -each)), piece)
        self._least = [(work, rank) for rank, work in enumerate(self._work)]
        heapq.heapify(self._least)

    def take(self, rank: int, piece: Piece, most: int | None = None) -> Piece:
        """Give a rank the beginning of a piece, as far as it has room, or `most` tokens; returns the rest."""
        middle = piece.start + min(piece.num_tokens, self.room[rank] if most is None else most)
        if middle > piece.start:
            self.pieces[rank].append(piece._replace(stop=middle))
            self._work[rank] += self.pieces[rank][-1].work
            self.room[rank] -= middle - piece.start
        return piece._replace(start=middle)

    def way(self, padding: frozenset[int]) -> _Way:
        """The shares, each in order, with neighbouring pieces joined."""
        pieces = tuple(tuple(_joined(each)) for each in self.pieces)
        work = [sum(each.work for each in of_rank if each.document not in padding) for of_rank in pieces]
        return _Way(pieces, work)


def _sizes(length: int, rooms: Sequence[int]) -> list[int]:
    """A document's tokens on so many ranks, as evenly as there is room; empty if there is not enough."""
    if sum(rooms) < length:
        return []
    even, more = divmod(length, len(rooms))
    sizes = [min(even + (each < more), room) for each, room in enumerate(rooms)]
    rest = length - sum(sizes)
    for each, room in enumerate(rooms):
        added = min(room - sizes[each], rest)
        sizes[each] += added
        rest -= added
    return sizes


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces in order, neighbours as one."""
    found: list[Piece] = []
    for piece in sorted(pieces):
        if found and found[-1].document == piece.document and found[-1].stop == piece.start:
            found[-1] = found[-1]._replace(stop=piece.stop)
        else:
            found.append(piece)
    return found
