"""Global batches fixed by (seed, step): for any ranks, micro-batch size, prefetching, and after a resume."""

import json
import threading
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from k25_train.config.sources import MixFrom
from k25_train.data.batch import MicroBatch
from k25_train.data.decode.frames import MediaInfo
from k25_train.data.formats.dataset import Dataset, load_dataset
from k25_train.data.loader import DataLoader
from k25_train.data.mix.plan import StepPlan
from k25_train.data.mix.planner import Planner
from k25_train.data.mix.state import LoaderState
from k25_train.data.prefetch import StepPrefetch
from k25_train.errors import ConfigError, DataError
from tests.helpers.smoke_mix import shard_sources
from tests.helpers.tiny_shards import (
    Media,
    Sample,
    all_words,
    make_image,
    make_text,
    tiny_data_config,
    tiny_samples,
    tiny_train_config,
    tiny_vision_config,
    write_shard_set,
    write_tiny_shard_set,
)

BROKEN = Media("image", "png", b"broken", MediaInfo(width=28, height=28, num_frames=1, duration_s=0.0))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_shard_set(tmp_path_factory.mktemp("tiny"))


def open_loader(directory: Path, *, data: dict[str, Any] | None = None, **train: Any) -> DataLoader:
    """A loader with the tiny configs; `data` and `train` replace fields of theirs."""
    return DataLoader(
        replace(tiny_data_config(directory), **(data or {})),
        replace(tiny_train_config(), **train),
        tiny_vision_config(),
    )


def dataset_of(directory: Path) -> Dataset:
    """The shard set behind a loader."""
    return load_dataset(str(directory))


def share_of(loader: DataLoader, plan: StepPlan, dp_rank: int, dp_size: int) -> list[MicroBatch]:
    """The micro-batches of one of several ranks."""
    return loader.micro_batches(plan, dp_rank=dp_rank, dp_size=dp_size, reads=all_words(with_pixels=True))


def batches_of(loader: DataLoader, step: int, *, with_pixels: bool = True) -> list[MicroBatch]:
    """The micro-batches of a step, on a rank that computes all of them."""
    return loader.micro_batches(
        loader.plan(step), dp_rank=0, dp_size=1, reads=all_words(with_pixels=with_pixels)
    )


def heldout_batches(
    loader: DataLoader, *, with_pixels: bool = True, shuffle_media_seed: int | None = None
) -> list[MicroBatch]:
    """The micro-batches of eight held-out sequences, on a rank that computes all of them."""
    plan = loader.plan_evaluation(8, shuffle_media_seed)
    return loader.micro_batches(plan, dp_rank=0, dp_size=1, reads=all_words(with_pixels=with_pixels))


def joined(batches: Sequence[MicroBatch]) -> dict[str, Any]:
    """Micro-batches laid end to end, by field."""
    whole: dict[str, Any] = {}
    for field in fields(MicroBatch):
        values = [getattr(batch, field.name) for batch in batches]
        if field.name in ("item_documents", "failed_items", "padding", "unreadable", "media_positions"):
            continue  # positions inside their own micro-batch
        whole[field.name] = torch.cat(values) if isinstance(values[0], torch.Tensor) else sum(values, ())
    return whole


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert same, name


@pytest.mark.parametrize("step", [0, 5])
@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_global_batch_does_not_depend_on_ranks_or_micro_batches(
    tiny: Path, step: int, dp_size: int, micro_batch_size: int
) -> None:
    reference = joined(batches_of(open_loader(tiny), step))
    loader = open_loader(tiny, micro_batch_size=micro_batch_size)

    plan = loader.plan(step)
    batches = [batch for rank in range(dp_size) for batch in share_of(loader, plan, rank, dp_size)]

    assert len(batches) == 8 // micro_batch_size
    assert_equal(joined(batches), reference)


def test_resuming_needs_only_the_step(tiny: Path) -> None:
    running = open_loader(tiny)
    steps = [joined(batches_of(running, step)) for step in range(12)]

    resumed = open_loader(tiny)

    for step in range(7, 12):
        assert_equal(joined(batches_of(resumed, step)), steps[step])


def test_seed_alone_changes_the_order(tiny: Path) -> None:
    one, same, other = (joined(batches_of(open_loader(tiny, seed=s), 0)) for s in (1, 1, 2))

    assert torch.equal(one["tokens"], same["tokens"])
    assert not torch.equal(one["tokens"], other["tokens"])


def test_epochs_are_shuffled_anew_and_cover_every_sample(tiny: Path) -> None:
    loader = open_loader(
        tiny, data={"sources": shard_sources(caption=1.0)}, global_batch_size=1, micro_batch_size=1
    )
    keys: list[str] = []
    step = 0
    while len(keys) < 120:
        keys += [piece.record.key for piece in loader.plan(step).sequences[0].pieces]
        step += 1

    # An epoch leaves the samples of one sequence to the next.
    counts = [keys.count(f"caption-{i}") for i in range(12)]
    assert sum(counts) == len(keys)
    assert max(counts) - min(counts) <= 2
    assert keys[:12] != keys[12:24]


def test_without_shuffle_samples_come_in_file_order(tiny: Path) -> None:
    sources = shard_sources(text=1.0)
    loader = open_loader(tiny, data={"sources": sources, "shuffle": False})

    pieces = [piece for sequence in loader.plan(0).sequences for piece in sequence.pieces]

    keys = [piece.record.key for piece in pieces]
    assert list(dict.fromkeys(keys)) == [f"text-{i}" for i in range(len(set(keys)))]


def test_plan_says_what_the_batches_hold(tiny: Path) -> None:
    loader = open_loader(tiny)

    for step in range(6):
        plan = loader.plan(step)
        batches = batches_of(loader, step)
        whole = joined(batches)
        sizes = plan.sizes()
        assert tuple(item.grid_thw for item in plan.items) == whole["grid_thw"]
        assert sizes.num_patches == len(whole["pixels"])
        assert sizes.num_vision_tokens == (whole["tokens"] == loader.tokenizer.media_pad).sum()
        assert sizes.num_tokens == (whole["tokens"] != loader.tokenizer.pad).sum()
        for batch in batches:
            assert sum(batch.document_lengths) == len(batch.tokens) == 2 * 128
            ends = torch.tensor(batch.document_lengths).cumsum(0)
            assert 128 in ends, "a document crosses rows"


def test_tokens_follow_the_weights(tiny: Path) -> None:
    loader = open_loader(tiny)

    served = [loader.plan(step).served() for step in range(100)]

    tokens = {name: sum(each[name].num_tokens for each in served if name in each) for name in loader.sources}
    total = sum(tokens.values())
    for name, weight in {"text": 0.4, "caption": 0.3, "ocr": 0.1, "video": 0.2}.items():
        assert abs(tokens[name] - weight * total) < 2 * 128


def test_a_state_is_small_and_goes_on_where_it_was(tiny: Path) -> None:
    running = open_loader(tiny)
    states = [running.state_after(running.plan(step)) for step in range(40)]
    assert len(json.dumps(states[-1])) < 4 * 400

    for step in (3, 17, 39):
        resumed = open_loader(tiny)
        resumed.start_from(step, json.loads(json.dumps(states[step - 1])))
        for later in range(step, step + 5):
            assert list(resumed.plan(later).sequences) == list(running.plan(later).sequences)


class Read(NamedTuple):
    """What a consumer makes of a plan."""

    plan: StepPlan
    batches: list[MicroBatch]


def prefetch_of(loader: DataLoader) -> StepPrefetch[Read]:
    """What reads as a rank does that computes all of each batch."""

    def read(plan: StepPlan) -> Read:
        return Read(plan, loader.micro_batches(plan, dp_rank=0, dp_size=1, reads=all_words(with_pixels=True)))

    return loader.prefetch(read)


def test_prefetched_batches_are_the_same_and_the_thread_ends(tiny: Path) -> None:
    plain = open_loader(tiny)
    with open_loader(tiny, data={"prefetch_steps": 2}, steps=5) as loader:
        prefetch = prefetch_of(loader)
        for step in (0, 1, 2, 4, 3):  # out of order too
            read = prefetch.get(step)
            assert list(read.plan.sequences) == list(plain.plan(step).sequences)
            assert_equal(joined(read.batches), joined(batches_of(plain, step)))
        assert any(thread.name.startswith("prefetch") for thread in threading.enumerate())

    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_error_in_the_prefetch_thread_reaches_the_caller(tmp_path: Path) -> None:
    directory = write_tiny_shard_set(tmp_path / "set")
    with open_loader(
        directory, data={"prefetch_steps": 1, "sources": shard_sources(video=1.0)}, steps=50
    ) as loader:
        prefetch = prefetch_of(loader)
        prefetch.get(0)
        for shard in directory.glob("train-*.tar"):
            shard.write_bytes(b"")

        with pytest.raises(DataError, match=r"train-0000\d.tar.*cut short while in use"):
            for step in range(1, 50):
                prefetch.get(step)


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_each_batch_is_planned_once_however_many_use_its_plan(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, prefetch_steps: int
) -> None:
    """At 16,384 sequences per step, for a consumer of micro-batches, vision items and token counts."""
    planned: list[int] = []
    plan_step = Planner.plan

    def plan_and_count(planner: Planner, state: LoaderState) -> tuple[StepPlan, LoaderState]:
        planned.append(state.step)
        return plan_step(planner, state)

    monkeypatch.setattr(Planner, "plan", plan_and_count)
    data = {"prefetch_steps": prefetch_steps}
    with open_loader(tiny, data=data, steps=2, global_batch_size=16384, micro_batch_size=1) as loader:

        def read(plan: StepPlan) -> tuple[StepPlan, int, int]:
            share = loader.micro_batches(plan, dp_rank=5, dp_size=2048, reads=all_words(with_pixels=False))
            return plan, len(share), len(plan.items)

        prefetch = loader.prefetch(read)
        for step in range(2):
            plan, num_micro_batches, num_items = prefetch.get(step)
            assert (len(plan.sequences), num_micro_batches) == (16384, 8)
            sizes = plan.sizes()
            assert 0 < num_items < sizes.num_vision_tokens < sizes.num_tokens

    assert sorted(planned) == [0, 1]


def test_eval_is_the_same_every_time_and_half_text(tiny: Path) -> None:
    loader = open_loader(tiny)

    whole = joined(heldout_batches(loader))
    by_rank = [batch for rank in (0, 1) for batch in share_of(loader, loader.plan_evaluation(8), rank, 2)]

    assert_equal(joined(by_rank), whole)
    rows = (whole["source"] != 0).view(8, 128).any(dim=1)
    assert rows.sum() == 4
    assert_equal(joined(heldout_batches(open_loader(tiny, seed=99))), whole)


def test_eval_reads_held_out_samples_alone(tiny: Path) -> None:
    loader = open_loader(tiny)
    train, heldout = (
        {dataset_of(tiny).reader.read_texts(record)[-1] for record in dataset_of(tiny).splits[split]}
        for split in ("train", "heldout")
    )
    assert not train & heldout

    tokens = torch.cat([batch.tokens for batch in heldout_batches(loader, with_pixels=False)])

    text = loader.tokenizer.decode(tokens.tolist())
    captions = [words for words in heldout if len(words.split()) < 20]
    assert sum(words in text for words in captions) >= 4
    assert not any(words in text for words in train if len(words.split()) > 5)


def test_limit_samples_uses_the_same_few_for_train_and_eval(tiny: Path) -> None:
    loader = open_loader(tiny, data={"sources": shard_sources(caption=1.0), "limit_samples": 3})

    trained = {p.record.key for step in range(5) for s in loader.plan(step).sequences for p in s.pieces}
    evaluated = loader.tokenizer.decode(
        torch.cat([batch.tokens for batch in heldout_batches(loader, with_pixels=False)]).tolist()
    )

    assert trained == {"caption-0", "caption-1", "caption-2"}
    records = [r for r in dataset_of(tiny).splits["train"] if r.kind == "caption"]
    words = [dataset_of(tiny).reader.read_texts(record)[1] for record in records]
    assert [text in evaluated for text in words[:3]] == [True] * 3
    assert not any(text in evaluated for text in words[3:])


def test_shuffled_media_keep_the_words_and_change_every_image(tiny: Path) -> None:
    loader = open_loader(tiny, data={"sources": shard_sources(caption=1.0), "limit_samples": 5})

    own, other, again = (
        documents_of(heldout_batches(loader, shuffle_media_seed=seed), loader) for seed in (None, 3, 3)
    )

    assert set(own) == set(other)
    assert len(own) == 5
    for words, pixels in own.items():
        assert pixels.shape != other[words].shape or not torch.equal(pixels, other[words])
        assert torch.equal(other[words], again[words])
    sums = sorted(round(float(pixels.double().sum()), 3) for pixels in own.values())
    assert sums == sorted(round(float(pixels.double().sum()), 3) for pixels in other.values())


def documents_of(batches: Sequence[MicroBatch], loader: DataLoader) -> dict[str, torch.Tensor]:
    """Caption -> pixels of its image."""
    found = {}
    for batch in batches:
        assert batch.pixels is not None
        tokens = batch.tokens.split(list(batch.document_lengths))
        pixels = batch.pixels.split([t * h * w for t, h, w in batch.grid_thw])
        for document, patches in zip(batch.item_documents, pixels, strict=True):
            caption = loader.tokenizer.decode(tokens[document].tolist()).split("<|media_end|>")[1]
            found[caption] = patches
    return found


def with_bad(samples: Sequence[Sample], tmp_path: Path) -> Path:
    good = tiny_samples(4, seed=0)
    return write_shard_set(tmp_path / "set", {"train": [*good, *samples], "heldout": tiny_samples(3, 1000)})


BAD_SAMPLES = {
    "caption without an image": (
        Sample("bad", "caption", ["red"]),
        "its kind is caption but it has no image and no video",
    ),
    "text with an image": (
        Sample("bad", "text", [make_image(28, 28, "png", 1)]),
        "its kind is text but it has media",
    ),
    "empty text": (Sample("bad", "text", [""]), "its text is empty"),
    "empty file": (
        Sample("bad", "caption", [replace(BROKEN, data=b""), "red"]),
        "its image file is empty",
    ),
    "longer than the sequence": (
        Sample("bad", "caption", [make_image(28, 28, "png", 1), make_text(200, 1)]),
        r"it has \d\d\d tokens and is not cut, train.seq_len is 128",
    ),
    "beyond the limits": (
        Sample("bad", "caption", [make_image(500, 1, "png", 1), "red"]),
        "its image has 500x1 pixels: scaled to the limit of 32 patches per side",
    ),
}


@pytest.mark.parametrize(("sample", "reason"), BAD_SAMPLES.values(), ids=BAD_SAMPLES.keys())
def test_sample_that_the_index_shows_to_be_bad_is_skipped_up_to_the_limit(
    tmp_path: Path, sample: Sample, reason: str
) -> None:
    directory = with_bad([sample], tmp_path)

    with pytest.raises(DataError, match=rf"train-\d+.tar, sample bad: {reason}"):
        open_loader(directory)

    loader = open_loader(directory, data={"max_skipped_samples": 1})
    keys = {p.record.key for step in range(20) for s in loader.plan(step).sequences for p in s.pieces}
    assert len(loader.skip_log.skipped) == 1
    assert "bad" not in keys
    assert len(keys) == 16


def test_broken_image_stops_training_only_past_the_limit(tmp_path: Path) -> None:
    directory = with_bad([Sample("bad", "caption", [BROKEN, "red"])], tmp_path)
    caption_only = {"sources": shard_sources(caption=1.0)}

    with pytest.raises(DataError, match=r"sample bad: its image .* does not decode"):
        for step in range(5):
            batches_of(open_loader(directory, data=caption_only), step)

    loader = open_loader(directory, data={**caption_only, "max_skipped_samples": 1})
    batches = [batch for step in range(5) for batch in batches_of(loader, step)]
    assert any(batch.failed_items for batch in batches)
    assert len(loader.skip_log.skipped) == 1


def test_kind_without_samples_is_refused(tmp_path: Path) -> None:
    samples = [s for s in tiny_samples(2, seed=0) if s.kind != "video"]
    directory = write_shard_set(tmp_path / "set", {"train": samples, "heldout": samples})

    with pytest.raises(DataError, match=r"data.sources.video: .* no usable sample of it \(0 in this split"):
        open_loader(directory)


def test_set_without_a_held_out_split_is_refused(tmp_path: Path) -> None:
    directory = write_shard_set(tmp_path / "set", {"train": tiny_samples(2, seed=0)})

    with pytest.raises(DataError, match="holds anything out, so there is nothing to evaluate on"):
        heldout_batches(open_loader(directory), with_pixels=False)


def test_batch_that_does_not_divide_is_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"8 sequences .*micro_batch_size=3 on 1 .*multiples of 3"):
        batches_of(open_loader(tiny, micro_batch_size=3), 0, with_pixels=False)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"vision_ratio": 0.5}, "no source with a weight has media"),
        ({"schedule": {"late": MixFrom(from_step=50, vision_ratio=0.5)}}, "vision_ratio=0.5, but no source"),
    ],
)
def test_a_vision_ratio_that_no_source_gives_is_refused_at_the_start(
    tiny: Path, more: dict[str, Any], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        open_loader(tiny, data={"sources": shard_sources(text=1.0), **more})
