"""The invariants that k25_train/data/mix/packing.py lists, on arbitrary lengths, next to a plain packing."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.data.mix.packing import Packed, pack_cut, pack_whole
from tests.helpers import plain_packing

lengths_lists = st.lists(st.integers(0, 60), max_size=200)
seq_lens = st.integers(1, 40)


def rows_of(packed: Packed) -> list[list[tuple[int, int, int]]]:
    pieces = list(
        zip(packed.documents.tolist(), packed.starts.tolist(), packed.lengths.tolist(), strict=True)
    )
    ends = packed.offsets.tolist()
    return [pieces[first:end] for first, end in pairwise(ends)]


@settings(max_examples=60, deadline=None)
@given(lengths_lists, seq_lens)
def test_text_is_cut_as_the_plain_packing_cuts_it(lengths: list[int], seq_len: int) -> None:
    plain = plain_packing.pack_cut(lengths, range(len(lengths)), seq_len)

    packed = pack_cut(np.array(lengths, dtype=np.int64), seq_len)

    expected = [[(p.document, p.start, p.length) for p in row] for row in plain.sequences]
    assert rows_of(packed) == expected
    assert packed.num_tokens().tolist() == [sum(p.length for p in row) for row in plain.sequences]


@settings(max_examples=60, deadline=None)
@given(lengths_lists, seq_lens, st.integers(0, 3))
def test_whole_documents_are_placed_once_or_left_out_for_length(
    lengths: list[int], seq_len: int, key: int
) -> None:
    packed = pack_whole(np.array(lengths, dtype=np.int64), seq_len, key)

    rows = rows_of(packed)
    placed = sorted(document for row in rows for document, _, _ in row)
    assert placed == [i for i, length in enumerate(lengths) if 0 < length <= seq_len]
    assert all((start, length) == (0, lengths[i]) for row in rows for i, start, length in row)
    assert all(0 < sum(length for _, _, length in row) <= seq_len for row in rows)


DRAWS = {
    "several to a sequence": lambda draw: draw.integers(300, 800, 4000),
    "of any length": lambda draw: draw.integers(20, 4097, 4000),
    "many short ones": lambda draw: np.clip(draw.lognormal(6, 1, 4000).astype(np.int64), 20, 4096),
    "three to a sequence": lambda draw: draw.integers(1000, 1700, 4000),
}


@pytest.mark.parametrize("name", DRAWS)
def test_as_few_sequences_as_the_plain_packing_or_fewer(name: str) -> None:
    lengths = DRAWS[name](np.random.Generator(np.random.PCG64(0)))
    plain = plain_packing.pack_whole(lengths.tolist(), range(len(lengths)), 4096)

    packed = pack_whole(lengths, 4096, 0)

    assert packed.num_sequences <= 1.01 * len(plain.sequences)
    assert packed.num_sequences * 4096 <= 1.03 * lengths.sum() + 4096


def test_sequences_in_another_order_keep_their_pieces() -> None:
    packed = pack_cut(np.array([5, 9, 3, 14]), 8)
    order = np.array([2, 0, 3, 1])

    assert rows_of(packed.in_order(order)) == [rows_of(packed)[number] for number in order]
