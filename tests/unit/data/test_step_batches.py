"""What ranks know of a step's micro-batches without reading them, and stacks of those that they read."""

from collections.abc import Sequence

import pytest
import torch

from k25_train.data.batch import MicroBatch, Reads, mask_failed, mask_unreadable
from k25_train.data.context import WholeContext
from k25_train.data.loader import DataLoader
from k25_train.data.step_batches import StepBatches, stack, without_failures
from k25_train.training.device_batch import to_device
from tests.helpers.tiny_shards import (
    all_words,
    tiny_data_config,
    tiny_train_config,
    tiny_vision_config,
    write_tiny_shard_set,
)

NOTHING = Reads(tokens=False, labels=False, pixels=False)
FIRST = Reads(tokens=True, labels=False, pixels=False)
LAST = Reads(tokens=False, labels=True, pixels=False)


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> DataLoader:
    folder = write_tiny_shard_set(tmp_path_factory.mktemp("shards"))
    return DataLoader(tiny_data_config(folder), tiny_train_config(), tiny_vision_config())


def read(loader: DataLoader, step: int, reads: Reads) -> list[MicroBatch]:
    return loader.micro_batches(loader.plan(step), dp_rank=0, dp_size=1, reads=reads)


def of_index(batch: MicroBatch) -> tuple[object, ...]:
    return (
        batch.document_lengths, batch.padding, batch.num_targets, batch.unreadable, batch.grid_thw,
        batch.item_documents,
    )  # fmt: skip


def test_the_index_tells_what_has_a_loss(loader: DataLoader) -> None:
    for step in range(6):
        wholes = read(loader, step, all_words(with_pixels=False))
        for stage in (NOTHING, FIRST, LAST):
            for whole, part in zip(wholes, read(loader, step, stage), strict=True):
                assert of_index(part) == of_index(whole)
                assert sum(part.num_targets) == whole.loss_mask.sum()
                ends = torch.tensor(part.document_lengths).cumsum(0).tolist()
                for end, length, count in zip(ends, part.document_lengths, part.num_targets, strict=True):
                    assert whole.loss_mask[end - length : end].sum() == count


def test_each_stage_has_what_it_asked_for(loader: DataLoader) -> None:
    (whole, *_) = read(loader, 0, all_words(with_pixels=False))
    (first, *_), (last, *_) = read(loader, 0, FIRST), read(loader, 0, LAST)
    (nothing, *_) = read(loader, 0, NOTHING)
    assert torch.equal(first.tokens, whole.tokens)
    assert torch.equal(first.media_positions, whole.media_positions)
    assert torch.equal(last.labels, whole.labels)
    assert torch.equal(last.loss_mask, whole.loss_mask)
    assert torch.equal(last.source, whole.source)
    absent = [first.labels, first.loss_mask, first.source, last.tokens, nothing.tokens, nothing.labels]
    assert [tensor.numel() for tensor in absent] == [0] * 6


def test_a_stack_is_its_micro_batches(loader: DataLoader) -> None:
    batches = read(loader, 1, all_words(with_pixels=True))
    stacked = stack(batches)
    assert stacked.num_with_loss == sum(batch.loss_mask.sum() for batch in batches)
    assert stacked.num_tokens == sum((batch.tokens != loader.tokenizer.pad).sum() for batch in batches)
    # Nothing is known of a policy: no column is made, shared among ranks or copied.
    assert stacked.policy.shape == (len(batches), 0, 0) and not stacked.responses.numel()
    held = WholeContext().held(stacked)
    for moved, batch in zip(to_device(held, torch.device("cpu")), batches, strict=True):
        assert moved.tokens.dtype is moved.labels.dtype is torch.int32
        assert torch.equal(moved.tokens, batch.tokens)
        assert torch.equal(moved.labels, batch.labels)
        assert torch.equal(moved.targets.loss_mask, batch.loss_mask)
        assert torch.equal(moved.targets.source, batch.source.long())
        assert torch.equal(moved.media_positions, batch.media_positions)
        assert moved.pixels is not None and batch.pixels is not None
        assert torch.equal(moved.pixels, batch.pixels)
        assert [column.numel() for column in moved.targets.policy] == [0] * 6
        assert (moved.document_lengths, moved.padding) == (batch.document_lengths, batch.padding)


def assert_same(stacked: StepBatches, batches: Sequence[MicroBatch]) -> None:
    expected = stack(batches)
    assert stacked.documents == expected.documents
    assert torch.equal(stacked.labels, expected.labels)
    assert torch.equal(stacked.loss_mask, expected.loss_mask)


@pytest.mark.parametrize("reads", [all_words(with_pixels=False), FIRST, LAST, NOTHING])
def test_what_others_could_not_read_has_no_loss(loader: DataLoader, reads: Reads) -> None:
    batches = read(loader, 2, reads)
    with_items = next(number for number, batch in enumerate(batches) if batch.grid_thw)
    stacked = stack(batches)
    failed = without_failures(stacked, {with_items: {0}}, {0: {1}})
    expected = list(batches)
    expected[0] = mask_unreadable(expected[0], [1])
    expected[with_items] = mask_failed(expected[with_items], [0])
    assert_same(failed, expected)
    assert 1 in failed.documents[0].padding
    assert failed.num_with_loss < stacked.num_with_loss
    assert failed.num_tokens == stacked.num_tokens - batches[0].document_lengths[1]
    again = without_failures(failed, {with_items: {0}}, {0: {1}})
    assert again.documents == failed.documents
