"""The invariants that k25_train/data/mix/packing.py lists, on arbitrary lengths."""

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k25_train.data.mix.packing import LOOK_AHEAD, PackedEpoch, Piece, epoch_order, pack_cut, pack_whole

lengths_lists = st.lists(st.integers(1, 60), max_size=200)
seq_lens = st.integers(1, 40)


def pieces_by_document(packed: PackedEpoch) -> dict[int, list[Piece]]:
    found = defaultdict(list)
    for sequence in packed.sequences:
        for piece in sequence:
            found[piece.document].append(piece)
    return found


@given(lengths_lists, seq_lens, st.integers(0, 5))
def test_cut_documents_are_covered_once_in_order_and_rows_are_full(
    lengths: list[int], seq_len: int, epoch: int
) -> None:
    packed = pack_cut(lengths, epoch_order(len(lengths), 1, epoch, 0, shuffle=True), seq_len)

    assert packed.skipped == ()
    pieces = pieces_by_document(packed)
    assert sorted(pieces) == list(range(len(lengths)))
    for document, length in enumerate(lengths):
        position = 0
        for piece in pieces[document]:
            assert piece.start == position
            assert piece.length > 0
            position += piece.length
        assert position == length
    sums = [sum(piece.length for piece in sequence) for sequence in packed.sequences]
    assert all(total == seq_len for total in sums[:-1])
    assert all(0 < total <= seq_len for total in sums[-1:])


@given(lengths_lists, seq_lens, st.integers(0, 5))
def test_whole_documents_are_placed_once_or_skipped_for_length(
    lengths: list[int], seq_len: int, epoch: int
) -> None:
    packed = pack_whole(lengths, epoch_order(len(lengths), 1, epoch, 0, shuffle=True), seq_len)

    assert packed.skipped == tuple(i for i, length in enumerate(lengths) if length > seq_len)
    pieces = pieces_by_document(packed)
    assert sorted([*pieces, *packed.skipped]) == list(range(len(lengths)))
    assert all(found == [Piece(i, 0, lengths[i])] for i, found in pieces.items())
    assert all(0 < sum(p.length for p in sequence) <= seq_len for sequence in packed.sequences)


@given(st.lists(st.integers(1, 10), min_size=1, max_size=300))
def test_oldest_waiting_document_opens_each_row(lengths: list[int]) -> None:
    packed = pack_whole(lengths, list(range(len(lengths))), 10)

    placed: set[int] = set()
    for sequence in packed.sequences:
        assert sequence[0].document == min(set(range(len(lengths))) - placed)
        assert max(piece.document for piece in sequence) < len(placed) + LOOK_AHEAD + len(sequence)
        placed |= {piece.document for piece in sequence}


def test_best_fit_fills_rows_that_first_fit_would_leave_open() -> None:
    packed = pack_whole([6, 3, 4, 7], [0, 1, 2, 3], 10)

    assert [[p.document for p in sequence] for sequence in packed.sequences] == [[0, 2], [1, 3]]


@pytest.mark.parametrize("changed", [{"seed": 4}, {"epoch": 1}, {"stream": 1}])
def test_order_depends_on_seed_epoch_and_stream_alone(changed: dict[str, int]) -> None:
    arguments = {"seed": 3, "epoch": 0, "stream": 0}

    order = epoch_order(50, **arguments, shuffle=True)

    assert sorted(order) == list(range(50))
    assert order == epoch_order(50, **arguments, shuffle=True)
    assert order != epoch_order(50, **{**arguments, **changed}, shuffle=True)
    assert epoch_order(50, **arguments, shuffle=False) == list(range(50))
