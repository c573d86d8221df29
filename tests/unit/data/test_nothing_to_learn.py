"""A blend that has nothing to learn from is refused at the start, with what would help."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k25_train.data.loader import DataLoader
from k25_train.errors import DataError
from tests.helpers.smoke_mix import shard_sources
from tests.helpers.tiny_shards import (
    Media,
    Prompt,
    Sample,
    all_words,
    make_image,
    make_text,
    tiny_data_config,
    tiny_train_config,
    tiny_vision_config,
    write_shard_set,
)

IMAGE = make_image(40, 28, "png", 1)
WORDS = make_text(30, 1)


def open_loader(
    folder: Path, kind: str, parts: Sequence[Sequence[str | Prompt | Media]], **data: Any
) -> DataLoader:
    """A loader of one kind, whose samples have these parts."""
    samples = [Sample(f"s{number}", kind, of_sample) for number, of_sample in enumerate(parts)]
    write_shard_set(folder, {"train": samples})
    config = replace(tiny_data_config(folder), sources=shard_sources(**{kind: 1.0}), **data)
    return DataLoader(config, tiny_train_config(), tiny_vision_config())


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("text", [Prompt(WORDS)]),
        ("caption", [IMAGE, Prompt(WORDS)]),
        ("caption", [IMAGE]),
        ("ocr", ["", IMAGE, Prompt("read")]),
    ],
)
def test_kind_without_a_loss_is_refused(
    tmp_path: Path, kind: str, parts: Sequence[str | Prompt | Media]
) -> None:
    with pytest.raises(
        DataError, match=rf"data.sources.{kind}: no text of its 3 samples .*~data\.sources\.{kind}"
    ):
        open_loader(tmp_path, kind, [parts] * 3)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [("text", [Prompt(WORDS), WORDS]), ("caption", [IMAGE, ""]), ("ocr", [WORDS, IMAGE])],
)
def test_one_sample_with_a_loss_is_enough(
    tmp_path: Path, kind: str, parts: Sequence[str | Prompt | Media]
) -> None:
    silent: list[str | Prompt | Media] = [Prompt(WORDS)] if kind == "text" else [IMAGE, Prompt("red")]

    loader = open_loader(tmp_path, kind, [silent, parts])

    batches = loader.micro_batches(loader.plan(0), dp_rank=0, dp_size=1, reads=all_words(with_pixels=False))
    assert sum(float(batch.loss_mask.sum()) for batch in batches) > 0


def test_too_long_for_a_sequence_names_the_length_that_helps(tmp_path: Path) -> None:
    parts = [[IMAGE, make_text(words, 3)] for words in (5, 100, 120, 140, 160)]
    long = r"caption samples are longer than train\.seq_len=128"

    with pytest.raises(DataError, match=rf"4 {long}") as caught:
        open_loader(tmp_path / "a", "caption", parts, max_skipped_samples=1)
    lengths = sorted(
        int(line.split(" tokens and")[0].split()[-1]) for line in str(caught.value).splitlines()[1:5]
    )
    assert f"{lengths[-2]} is the smallest that leaves 1 of them out, {lengths[-1]} holds all" in str(
        caught.value
    )
    assert "ebuild" not in str(caught.value)

    # That length is enough, and one less is not.
    config = replace(
        tiny_data_config(tmp_path / "a"), sources=shard_sources(caption=1.0), max_skipped_samples=1
    )
    train = tiny_train_config()
    DataLoader(config, replace(train, seq_len=lengths[-2]), tiny_vision_config())
    with pytest.raises(DataError, match="2 caption samples"):
        DataLoader(config, replace(train, seq_len=lengths[-2] - 1), tiny_vision_config())


def test_all_samples_too_long_is_refused_however_many_may_be_skipped(tmp_path: Path) -> None:
    parts = [[IMAGE, make_text(words, 3)] for words in (150, 100)]

    with pytest.raises(DataError, match=r"2 caption samples") as caught:
        open_loader(tmp_path, "caption", parts, max_skipped_samples=100)

    assert "is the smallest that leaves 1 of them out" in str(caught.value)


def test_limit_that_leaves_no_usable_sample_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no usable sample of it \(1 in this split\).*data\.limit_samples"):
        open_loader(tmp_path, "text", [[""], [WORDS]], limit_samples=1, max_skipped_samples=1)
