"""Plans of steps on made-up indexes: exact going on, changed mixtures, caps of epochs, held-out items."""

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from k25_train.config.sources import MixFrom
from k25_train.data.mix.lengths import Measured
from k25_train.data.mix.planner import PlannedSource, Planner
from k25_train.data.mix.state import LoaderState
from k25_train.data.mix.stream import SourceStream
from k25_train.data.mix.windows import BLOCK_ITEMS, WINDOW_ITEMS, Selection, Windows
from k25_train.errors import DataError
from tests.helpers.smoke_mix import shard_sources
from tests.helpers.tiny_shards import tiny_data_config

SEQ_LEN = 64


class Made:
    """Documents whose lengths follow from their numbers."""

    def __init__(self, name: str, num_items: int) -> None:
        self.name, self.num_items, self.is_cut = name, num_items, name == "text"

    def items(self, positions: np.ndarray) -> np.ndarray:
        return positions

    def measure(self, items: np.ndarray, *, is_first: bool) -> Measured:
        nothing = np.zeros(len(items) + 1, dtype=np.int64)
        return Measured(items * 7 % 50 + 5, nothing, np.zeros((0, 3), dtype=np.int32))

    def nothing_usable(self) -> str:
        return "nothing"


def planner_of(
    sizes: dict[str, int], tmp_path: Any, epochs: dict[str, float] | None = None, **fields: Any
) -> Planner:
    data = replace(
        tiny_data_config(tmp_path), **{"sources": shard_sources(**dict.fromkeys(sizes, 1.0)), **fields}
    )
    for name, cap in (epochs or {}).items():
        data.sources[name].epochs = cap
    sources = []
    for number, (name, num_items) in enumerate(sizes.items()):
        documents: Any = Made(name, num_items)
        windows = Windows(num_items, 3, name, shuffle=True)
        stream = SourceStream(number, documents, windows, SEQ_LEN, (epochs or {}).get(name))
        sources.append(PlannedSource(stream, name != "text", documents))
    return Planner(sources, data, lambda _step: 16)


def served_by(planner: Planner, state: LoaderState, num_steps: int) -> tuple[list[Any], LoaderState]:
    """What each step has, by source and piece, and the state behind them."""
    found = []
    for _ in range(num_steps):
        plan, state = planner.plan(state)
        arrays = plan.sequences_of
        sources = np.repeat(plan.source, np.diff(arrays.offsets))
        pieces = zip(sources, arrays.items, arrays.starts, arrays.lengths, strict=True)
        found.append([tuple(map(int, piece)) for piece in pieces])
    return found, state


SIZES = {"text": 2 * WINDOW_ITEMS, "caption": 300, "video": 40}


def test_any_state_gives_the_steps_behind_it(tmp_path: Any) -> None:
    running = planner_of(SIZES, tmp_path)
    before, state = served_by(running, LoaderState(), 70)
    after, _ = served_by(running, state, 20)

    again = LoaderState.from_json(json.loads(json.dumps(state.to_json())))
    assert served_by(planner_of(SIZES, tmp_path), again, 20)[0] == after
    assert served_by(planner_of(SIZES, tmp_path), LoaderState(), 90)[0] == before + after


def test_an_epoch_has_every_token_once_and_the_next_in_another_order(tmp_path: Any) -> None:
    planner = planner_of({"text": 500}, tmp_path)
    lengths = np.arange(500) * 7 % 50 + 5
    steps, _ = served_by(planner, LoaderState(), 2 * int(lengths.sum()) // SEQ_LEN // 16 + 2)
    pieces = [piece for step in steps for piece in step]
    ends = np.cumsum([piece[3] for piece in pieces])
    epoch = pieces[: int(np.searchsorted(ends, lengths.sum())) + 1]

    tokens = Counter[int]()
    for _, item, _, length in epoch:
        tokens[item] += length
    assert tokens == {item: int(length) for item, length in enumerate(lengths)}
    assert [p[1] for p in pieces[len(epoch) :][: len(epoch)]] != [p[1] for p in epoch]


def test_another_mixture_repeats_and_drops_nothing(tmp_path: Any) -> None:
    """A weight changes, then a source leaves, and comes back: each goes on where it was."""
    alone: dict[int, list[Any]] = {}
    for number, name in enumerate(SIZES):
        steps, _ = served_by(planner_of({name: SIZES[name]}, tmp_path), LoaderState(), 150)
        alone[number] = [piece[1:] for step in steps for piece in step]

    state, got = LoaderState(), {number: list[Any]() for number in alone}
    names = list(SIZES)
    for sizes, fields in (
        (SIZES, {}),
        (SIZES, {"vision_ratio": 0.5}),
        ({"text": SIZES["text"], "video": 40}, {}),
        (SIZES, {"schedule": {"more": MixFrom(from_step=70, weights={"video": 5.0})}}),
    ):
        steps, state = served_by(planner_of(sizes, tmp_path, **fields), state, 20)
        kept = list(sizes)
        for step in steps:
            for source, *piece in step:
                got[names.index(kept[source])].append(tuple(piece))

    for number, pieces in got.items():
        assert pieces
        assert pieces == alone[number][: len(pieces)]


def test_a_cap_ends_a_source_and_the_last_one_ends_the_run_by_name(tmp_path: Any) -> None:
    planner = planner_of({"text": 4000, "caption": 300}, tmp_path, {"caption": 0.5})
    steps, state = served_by(planner, LoaderState(), 60)
    captions = [piece for step in steps for piece in step if piece[0] == 1]
    assert len({piece[1] for piece in captions}) == len(captions)
    assert 0.4 * 300 < len(captions) < 0.6 * 300
    assert abs(state.sources["caption"].epochs_used - 0.5) < 0.02

    capped = planner_of({"text": 4000, "caption": 300}, tmp_path, {"caption": 1.5}, vision_ratio=0.5)
    with pytest.raises(
        DataError, match=r"step \d+: all sources with media are used up: caption \(epochs=1\.5\)"
    ):
        served_by(capped, LoaderState(), 200)


def test_windows_cover_every_item_once() -> None:
    for num_items in (1, 63, 65, 1000, 3 * WINDOW_ITEMS + 17):
        windows = Windows(num_items, 1, "a", shuffle=True)
        items = np.concatenate([windows.items(0, number) for number in range(windows.num_windows)])
        assert np.array_equal(np.sort(items), np.arange(num_items))
        in_order = Windows(num_items, 1, "a", shuffle=False)
        items = np.concatenate([in_order.items(0, number) for number in range(in_order.num_windows)])
        assert np.array_equal(items, np.arange(num_items))
    far = Windows(10**10, 1, "a", shuffle=True)
    assert len(far.items(5, far.num_windows // 2)) == pytest.approx(WINDOW_ITEMS, abs=BLOCK_ITEMS)


@pytest.mark.parametrize(("num_items", "num_heldout"), [(10, 0), (10, 5), (11, 3), (1000, 7), (3, 1)])
def test_held_out_items_are_the_others(num_items: int, num_heldout: int) -> None:
    selection = Selection(num_items, num_heldout)
    training = selection.training(np.arange(selection.num_training))
    heldout = selection.heldout(np.arange(num_heldout))

    assert sorted([*training, *heldout]) == list(range(num_items))
    assert list(training) == sorted(training)
