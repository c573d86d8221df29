"""Padding of the smoke set's mixture, next to the least that any packing of its documents can have.

`tests/golden/data/smoke_lengths.json` has the lengths of the smoke set's documents with media, in tokens of
`experiment=smoke`: source -> pairs of a length and how many have it. Its text is cut, so it is not padded.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from k25_train.compose.resolve import compose
from k25_train.data.mix.packing import pack_whole
from k25_train.data.mix.state import SourcePosition
from k25_train.data.mix.stream import SourceStream
from tests.helpers.made_documents import stream_of

LENGTHS = Path(__file__).parents[2] / "golden" / "data" / "smoke_lengths.json"
MOST_PADDING, MOST_ABOVE_BOUND = 0.02, 0.003
NUM_EPOCHS, MANY = 10, 100
"""Epochs that are packed, and those that the bound is of, in which a last sequence does not count."""


def least_sequences(lengths: np.ndarray, seq_len: int) -> int:
    """A lower bound of sequences for documents that stay whole: L2 of Martello and Toth (1990, section
    8.3)."""
    least = -(-int(lengths.sum()) // seq_len)
    for small in (1, *np.unique(lengths[2 * lengths <= seq_len]).tolist()):
        alone = np.count_nonzero(lengths > seq_len - small)
        halves = lengths[(2 * lengths > seq_len) & (lengths <= seq_len - small)]
        others = lengths[(lengths >= small) & (2 * lengths <= seq_len)]
        overflow = int(others.sum()) - (len(halves) * seq_len - int(halves.sum()))
        least = max(least, alone + len(halves) + max(0, -(-overflow // seq_len)))
    return int(least)


def told_by(stream: SourceStream) -> int:
    """How many sequences it tells next."""
    told = stream.more()
    assert told is not None
    return len(told)


def padding_of_mix(sequences: dict[str, float], tokens: dict[str, int], seq_len: int) -> float:
    """Padding of the smoke mixture, of which each source has its share of the tokens."""
    weights = {name: source.weight for name, source in compose(["experiment=smoke"]).data.sources.items()}
    places = {name: sequences[name] * seq_len / tokens[name] for name in sequences} | {"text": 1.0}
    return 1 - sum(weights.values()) / sum(weight * places[name] for name, weight in weights.items())


@pytest.mark.parametrize("seq_len", [256, 4096])
def test_padding_is_within_the_bar_or_next_to_the_least_possible(seq_len: int) -> None:
    served, least, tokens_of = {}, {}, {}
    for name, pairs in json.loads(LENGTHS.read_text()).items():
        lengths = np.repeat(*np.array(pairs, dtype=np.int64).T)
        stream = stream_of(lengths, seq_len, name=name)
        counts = [stream.more() for _ in range(NUM_EPOCHS)]
        tokens = np.concatenate([told for told in counts if told is not None])
        served[name] = len(tokens) / tokens.sum() * lengths.sum()
        least[name] = least_sequences(np.repeat(lengths, MANY), seq_len) / MANY
        tokens_of[name] = int(lengths.sum())

    found, bound = (padding_of_mix(each, tokens_of, seq_len) for each in (served, least))
    print(f"{seq_len}: {found:.2%}, at least {bound:.2%}")
    assert bound - 1e-9 <= found
    assert found <= (MOST_PADDING if bound <= MOST_PADDING - MOST_ABOVE_BOUND else bound + MOST_ABOVE_BOUND)


def test_the_bound_is_below_what_packing_needs_and_tight_for_large_documents() -> None:
    draw = np.random.Generator(np.random.PCG64(0))
    for low, high in ((1, 100), (30, 70), (51, 100), (34, 60)):
        lengths = draw.integers(low, high, 200)
        assert least_sequences(lengths, 100) <= pack_whole(lengths, 100, 0).num_sequences
    assert least_sequences(np.full(7, 51), 100) == 7


def test_what_a_window_leaves_is_in_the_next_once() -> None:
    """Documents of ten epochs of a small source, each ten times; and from any state the same ones."""
    lengths = np.random.Generator(np.random.PCG64(1)).integers(20, 60, 50)
    stream = stream_of(lengths, 100)
    positions, items, num_told = [], [], 0
    while stream.position.epoch < 10:
        if len(items) == num_told:
            num_told += told_by(stream)
        positions.append(stream.position)
        items.append(tuple(stream.serve(1).items.tolist()))
    counts = Counter(item for row in items for item in row)
    carried = stream.position.carried
    assert carried
    assert {item: counts[item] + carried.count(item) for item in range(50)} == dict.fromkeys(range(50), 10)

    again = stream_of(lengths, 100)
    for number in range(0, len(positions), 7):
        again.seek(positions[number])
        again.more()
        assert tuple(again.serve(1).items.tolist()) == items[number]


def test_a_cap_that_changes_in_its_last_window_repeats_and_drops_nothing() -> None:
    lengths = np.random.Generator(np.random.PCG64(2)).integers(20, 60, 50)
    capped, free = stream_of(lengths, 100, epochs=1.0), stream_of(lengths, 100)
    last = told_by(capped)
    assert capped.more() is None
    for served in range(1, last):
        capped.seek(SourcePosition())
        capped.more()
        begun = capped.serve(served).items.tolist()
        free.seek(capped.position)
        # Behind the last but one only the next epoch is left, with what this one left to it.
        rest = free.serve(told_by(free)).items.tolist()
        if served < last - 1:
            assert sorted([*begun, *rest, *free.position.carried]) == list(range(50))
        else:
            assert set(range(50)) - set(begun) <= set(rest)
