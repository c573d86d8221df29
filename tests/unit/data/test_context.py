"""What a rank holds of micro-batches that several share: together every token once, with its own label."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.data.batch import MicroBatch, Reads
from k25_train.data.context import (
    ContextShare,
    HeldBatches,
    SharedContext,
    WholeShare,
    context_of,
    context_plan,
    held_items,
)
from k25_train.data.loader import DataLoader
from k25_train.data.step_batches import StepBatches, stack, without_failures
from k25_train.training.device_batch import DeviceBatch, to_device
from parallel.context import plan, shares
from tests.helpers.tiny_shards import (
    all_words,
    tiny_data_config,
    tiny_train_config,
    tiny_vision_config,
    write_tiny_shard_set,
)

SIZES = (2, 4)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The documents of the tiny set are cut, too."""
    monkeypatch.setattr(shares, "MIN_PIECE_TOKENS", 4)
    plan._plan.cache_clear()


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> DataLoader:
    folder = write_tiny_shard_set(tmp_path_factory.mktemp("shards"))
    return DataLoader(tiny_data_config(folder), tiny_train_config(), tiny_vision_config())


def read(loader: DataLoader, step: int, reads: Reads) -> list[MicroBatch]:
    return loader.micro_batches(loader.plan(step), dp_rank=0, dp_size=1, reads=reads)


def on_ranks(batches: StepBatches, cp: int) -> list[list[DeviceBatch]]:
    """[rank] -> its micro-batches."""
    return [to_device(context_of(rank, cp).held(batches), CPU) for rank in range(cp)]


def put_back(parts: Sequence[torch.Tensor], shares: Sequence[np.ndarray]) -> torch.Tensor:
    whole = torch.full((sum(map(len, parts)),), -7, dtype=parts[0].dtype)
    for part, positions in zip(parts, shares, strict=True):
        whole[torch.from_numpy(positions)] = part
    return whole


@pytest.mark.parametrize("cp", SIZES)
def test_ranks_together_hold_every_token_once(loader: DataLoader, cp: int) -> None:
    wholes = read(loader, 1, all_words(with_pixels=True))
    by_rank = on_ranks(stack(wholes), cp)
    for number, whole in enumerate(wholes):
        parts = [batches[number] for batches in by_rank]
        assert all(part.share is not None and part.share.cp_rank == rank for rank, part in enumerate(parts))
        shares = [part.share.plan.positions(rank) for rank, part in enumerate(parts) if part.share]
        assert {len(part.tokens) for part in parts} == {len(whole.tokens) // cp}
        assert torch.equal(put_back([part.tokens for part in parts], shares).long(), whole.tokens)
        assert torch.equal(put_back([part.labels for part in parts], shares).long(), whole.labels)
        assert torch.equal(put_back([part.targets.loss_mask for part in parts], shares), whole.loss_mask)
        assert torch.equal(put_back([part.targets.source for part in parts], shares), whole.source.long())
        assert {part.document_lengths for part in parts} == {whole.document_lengths}
        assert {part.padding for part in parts} == {whole.padding}


@pytest.mark.parametrize("cp", SIZES)
def test_each_vision_token_takes_its_row_of_the_items_that_its_rank_encodes(
    loader: DataLoader, cp: int
) -> None:
    wholes = read(loader, 1, all_words(with_pixels=True))
    assert any(whole.grid_thw for whole in wholes)
    num_cut = 0
    by_rank = on_ranks(stack(wholes), cp)
    for number, whole in enumerate(wholes):
        # 1. A feature says which item it is of, and which of its tokens.
        features = {
            item: [(item, row) for row in range(grid.num_tokens)] for item, grid in enumerate(whole.grid_thw)
        }
        expected = dict(
            zip(whole.media_positions.tolist(), sum(features.values(), []), strict=True)  # noqa: RUF017
        )
        pixels = whole.pixels
        assert pixels is not None
        of_items = pixels.split([grid.num_patches for grid in whole.grid_thw]) if whole.grid_thw else ()
        found = {}
        for rank, batches in enumerate(by_rank):
            part = batches[number]
            assert part.share is not None and part.feature_rows is not None and part.pixels is not None
            positions = part.share.plan.positions(rank)
            here = sorted({expected[p][0] for p in positions.tolist() if p in expected})
            # 2. It encodes the items of which it holds a token, and no others.
            assert part.grid_thw == tuple(whole.grid_thw[item] for item in here)
            assert torch.equal(part.pixels, torch.cat([pixels[:0], *(of_items[item] for item in here)]))
            rows = [each for item in here for each in features[item]]
            for place, row in zip(part.media_positions.tolist(), part.feature_rows.tolist(), strict=True):
                found[int(positions[place])] = rows[row]
            num_cut += len(here)
        assert found == expected
        num_cut -= len(whole.grid_thw)
    assert num_cut > 0, "no item is on several ranks"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    items=st.lists(st.integers(1, 5), max_size=5),
    gaps=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    data=st.data(),
)
def test_rows_of_any_items_held_by_any_tokens(items: list[int], gaps: list[int], data: st.DataObject) -> None:
    order = [-1] * gaps[0]
    for item, size in enumerate(items):
        order += [item] * size + [-1] * gaps[item + 1]
    order += [-1]
    media = np.flatnonzero(np.array(order) >= 0)
    tokens = np.array(sorted(data.draw(st.sets(st.integers(0, len(order) - 1), min_size=1))))
    held = held_items(media, items, tokens)
    features = [(item, row) for item, size in enumerate(items) for row in range(size)]
    of_position = dict(zip(media.tolist(), features, strict=True))
    rows = [(item, row) for item in held.items for row in range(items[item])]
    expected = {place: of_position[p] for place, p in enumerate(tokens.tolist()) if p in of_position}
    assert dict(zip(held.positions.tolist(), [rows[row] for row in held.rows], strict=True)) == expected
    assert held.items.tolist() == sorted({item for item, _ in expected.values()})


@pytest.mark.parametrize(
    "reads",
    [
        Reads(tokens=True, labels=False, pixels=False),
        Reads(tokens=False, labels=True, pixels=False),
        Reads(tokens=False, labels=False, pixels=False),
    ],
    ids=["first stage", "last stage", "between"],
)
def test_stages_hold_the_same_tokens_of_what_they_read(loader: DataLoader, reads: Reads) -> None:
    whole = SharedContext(1, 2).held(stack(read(loader, 1, all_words(with_pixels=False))))
    held = SharedContext(1, 2).held(stack(read(loader, 1, reads)))
    assert held.shares == whole.shares
    if reads.tokens:
        assert torch.equal(held.batches.tokens, whole.batches.tokens)
        assert torch.equal(held.feature_rows, whole.feature_rows)
    if reads.labels:
        assert torch.equal(held.batches.labels, whole.batches.labels)
    empty = (held.batches.tokens, held.batches.labels)
    assert [each.shape[1] > 0 for each in empty] == [reads.tokens, reads.labels]


def test_samples_whose_words_fail_move_no_token_to_another_rank(loader: DataLoader) -> None:
    batches = stack(read(loader, 2, all_words(with_pixels=False)))
    failed = without_failures(batches, {}, {0: {1}})
    before, after = SharedContext(0, 2).held(batches), SharedContext(0, 2).held(failed)
    assert 1 in after.batches.documents[0].padding
    for here, there in zip(before.shares, after.shares, strict=True):
        assert isinstance(here, ContextShare) and isinstance(there, ContextShare)
        assert here.plan.pieces == there.plan.pieces
    first = after.shares[0]
    assert isinstance(first, ContextShare) and 1 in first.plan.padding
    assert context_plan(failed.documents[0], 2) == context_plan(batches.documents[0], 2)


def test_a_rank_alone_holds_the_micro_batches_as_they_are(loader: DataLoader) -> None:
    batches = stack(read(loader, 1, all_words(with_pixels=True)))
    held = context_of(0, 1).held(batches)
    assert held.batches is batches
    assert not held.is_shared
    for batch in to_device(held, CPU):
        assert isinstance(batch.share, WholeShare)
        assert batch.feature_rows is None


def test_tensors_elsewhere(loader: DataLoader) -> None:
    held = SharedContext(1, 2).held(stack(read(loader, 1, all_words(with_pixels=True))))
    moved: HeldBatches = held.with_tensors([each.clone() for each in held.tensors()])
    assert all(torch.equal(a, b) for a, b in zip(moved.tensors(), held.tensors(), strict=True))
    assert moved.shares == replace(held).shares


def test_tokens_of_sequences_follow_one_another(loader: DataLoader) -> None:
    (documents, *_) = stack(read(loader, 1, all_words(with_pixels=False))).documents
    shared = context_plan(documents._replace(lengths=documents.lengths * 3), 4)
    length = sum(documents.lengths)
    for rank in range(4):
        sequences = shared.positions(rank) // length
        assert sorted(sequences) == sequences.tolist()
        counts = [(sequences == number).sum() for number in range(3)]
        assert shared.tokens_of_sequences(rank, length) == tuple(counts)
    assert shared.tokens_of_sequences(0, 3 * length) == (shared.num_tokens,)
