"""Crop, mirror and colours at random: the same wherever they are computed, with the words that belong."""

import pickle
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from k25_train.config.data import AugmentConfig, DataConfig
from k25_train.config.sources import SourceConfig, SourceFormat
from k25_train.data.augment import rewriting
from k25_train.data.augment.draws import as_stored
from k25_train.data.augment.samples import RandomAugmentation
from k25_train.data.commands.indexing import index_source
from k25_train.data.decode.items import Drawn
from k25_train.data.decode.view import AS_IT_IS, View
from k25_train.data.formats.declared import UNDECLARED, DeclarationError, declared_in, swapped
from k25_train.data.formats.records import SampleRecord, TextSegment
from k25_train.data.formats.sample_json import SampleError, Words
from k25_train.data.loader import DataLoader
from k25_train.data.mix.plan import media_of
from k25_train.data.overview.shown import ShownDocument, show
from k25_train.data.tokenizer import train_tokenizer
from k25_train.data.units import MediaUnit
from tests.helpers.media_files import image_bytes, segment_of
from tests.helpers.tar_shards import tar_bytes
from tests.helpers.tiny_shards import (
    VOCAB_SIZE,
    all_words,
    make_text,
    tiny_data_config,
    tiny_train_config,
    tiny_vision_config,
)

SIDE = 56
MOVES = AugmentConfig(crop=0.5, flip=0.5, colour=0.0)


def framed(box: tuple[int, int, int, int]) -> Image.Image:
    """A red rectangle on grey."""
    pixels = np.full((SIDE, SIDE, 3), 100, dtype=np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = (255, 0, 0)
    return Image.fromarray(pixels)


def caption(number: int, box: tuple[int, int, int, int]) -> dict[str, object]:
    """Even ones declare what they say, of a box or of its two corners; odd ones do not."""
    numbers = "".join(f"<{round(1000 * value / SIDE):04d}>" for value in box)
    text = f"red at {numbers} on the left"
    points = [
        {"span": [7 + 12 * i, 19 + 12 * i], "kind": "point", "format": "normalized_1000"} for i in (0, 1)
    ]
    whole = [{"span": [7, 31], "kind": "box", "format": "normalized_1000", "media": 0}]
    declared = {"regions": points if number % 4 else whole, "orientation": True}
    return {"caption": text, **({} if number % 2 else declared)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("augmented")
    random = np.random.default_rng(3)
    members = []
    for number in range(16):
        left, top = random.integers(8, 24, size=2).tolist()
        box = (left, top, left + 20, top + 12)
        members.append((f"{number}.png", image_bytes(framed(box), "png")))
        members.append((f"{number}.json", caption(number, box)))
    (folder / "s.tar").write_bytes(tar_bytes(members))
    # One token each, as in vocabularies of real size.
    texts = [*(make_text(400, seed) for seed in range(4)), "on the left on the right " * 300]
    train_tokenizer(texts, VOCAB_SIZE, folder / "tokenizer.json")
    data = replace(
        tiny_data_config(folder),
        tokenizer=str(folder / "tokenizer.json"),
        sources={"tars": SourceConfig(format=SourceFormat.webdataset, path="s.tar")},
    )
    index_source("tars", data, str(folder / "tokenizer.json"), 0, lambda done, total, num_bytes: None)
    return data


def loader_of(data: DataConfig, augment: AugmentConfig | None = None) -> DataLoader:
    data = data if augment is None else replace(data, augment=augment)
    return DataLoader(data, tiny_train_config(), tiny_vision_config())


def documents(loader: DataLoader, steps: range) -> Iterator[tuple[int, ShownDocument]]:
    """Number of each sample, and what is trained on of it."""
    for step in steps:
        for sequence in loader.plan(step).sequences:
            [batch] = loader.read_sequences([sequence], all_words(with_pixels=True))
            shown = show(sequence, batch, loader.tokenizer, tiny_vision_config(), "tars")
            for piece, document in zip(sequence.pieces, shown.documents, strict=True):
                yield int(piece.record.key), document


def text_of(document: ShownDocument) -> str:
    return "".join(token.text for token in document.tokens if not token.is_special)


def is_true(document: ShownDocument) -> bool:
    """Whether coordinates in the text are around the red of the picture; two points are its corners."""
    pixels = document.images[0].pixels[:SIDE, :SIDE].astype(int)
    ys, xs = np.nonzero(pixels[..., 0] - pixels[..., 1] > 80)
    told = [int(value) * SIDE / 1000 for value in re.findall(r"<(\d{4})>", text_of(document))]
    told_x, told_y = sorted(told[::2]), sorted(told[1::2])
    found = [(xs.min(), xs.max() + 1), (ys.min(), ys.max() + 1)]
    return bool(np.abs(np.array([told_x, told_y]) - found).max() < 1.5)


def num_untrue(data: DataConfig) -> int:
    with loader_of(data, MOVES) as loader:
        return sum(not is_true(document) for number, document in documents(loader, range(1)))


def test_boxes_points_and_words_go_along_and_undeclared_samples_stay(corpus: DataConfig) -> None:
    with loader_of(corpus) as plain, loader_of(corpus, MOVES) as moved:
        texts, pictures = set(), set()
        for (number, before), (same, after) in zip(
            documents(plain, range(3)), documents(moved, range(3)), strict=True
        ):
            assert number == same and before.length == after.length
            assert is_true(after), text_of(after)
            if number % 2:
                assert text_of(before) == text_of(after)
                assert np.array_equal(before.images[0].pixels, after.images[0].pixels)
            texts.add(text_of(after).rpartition(" ")[2])
            pictures.add((number, after.images[0].pixels.tobytes()))
            values = [int(value) for value in re.findall(r"<(\d{4})>", text_of(after))]
            assert number % 4 or values[0] < values[2]
    # Both ways round, and another view in another epoch.
    assert {word for text in texts for word in ("left", "right") if word in text} == {"left", "right"}
    assert len(pictures) > 24


@pytest.mark.parametrize("fault", ["x not mirrored", "points not cropped"])
def test_planted_faults_are_seen(fault: str, corpus: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_untrue(corpus) == 0
    right = View.point
    if fault == "x not mirrored":
        monkeypatch.setattr(View, "point", lambda view, x, y: right(replace(view, flip=False), x, y))
    else:
        monkeypatch.setattr(View, "point", lambda view, x, y: (1 - x if view.flip else x, y))
    assert num_untrue(corpus) > 0


def test_ranks_processes_and_restarts_see_the_same(corpus: DataConfig) -> None:
    augment = AugmentConfig(crop=0.3, flip=0.5, colour=0.4)
    with loader_of(corpus, augment) as one, loader_of(corpus, augment) as other:
        # 1. One loader goes step by step, with one rank; the other begins at the third, with two.
        for step in range(3):
            plan = one.plan(step)
        reads = all_words(with_pixels=True)
        whole = one.micro_batches(plan, dp_rank=0, dp_size=1, reads=reads)
        again = other.plan(2)
        parts = [
            batch
            for rank in range(2)
            for batch in other.micro_batches(again, dp_rank=rank, dp_size=2, reads=reads)
        ]
        for here, there in zip(whole, parts, strict=True):
            assert torch.equal(here.tokens, there.tokens)
            assert here.pixels is not None and there.pixels is not None
            assert torch.equal(here.pixels, there.pixels)

        # 2. A worker gets a unit as a message, and nothing else of the plan.
        source, _, media = next(media_of(plan.sequences))
        unit = MediaUnit(source, media, None)
        told = pickle.loads(pickle.dumps(unit))
        found, expected = other.read_unit(told), one.read_unit(unit)
        assert torch.equal(found.items[0], expected.items[0])  # type: ignore[union-attr]
        assert media.drawn.key != as_stored(0, 0)


def test_evaluations_change_nothing(corpus: DataConfig) -> None:
    with loader_of(replace(corpus, limit_samples=8), MOVES) as loader:
        shown = loader.plan_evaluation(4)
        assert {media.drawn.key for _, _, media in media_of(shown.sequences)} == {as_stored(0, 0)}
        trained = loader.plan(0)
        assert as_stored(0, 0) not in {media.drawn.key for _, _, media in media_of(trained.sequences)}


def test_off_is_bitwise_nothing(corpus: DataConfig) -> None:
    off = AugmentConfig(crop=0.0, flip=0.0, colour=0.0)
    tiny = AugmentConfig(crop=0.0, flip=1e-12, colour=0.0)
    with loader_of(corpus, off) as one, loader_of(corpus, tiny) as other:
        plan, again = one.plan(0), other.plan(0)
        assert all(media.drawn.key == as_stored(0, 0) for _, _, media in media_of(plan.sequences))
        reads = all_words(with_pixels=True)
        for here, there in zip(
            one.micro_batches(plan, dp_rank=0, dp_size=1, reads=reads),
            other.micro_batches(again, dp_rank=0, dp_size=1, reads=reads),
            strict=True,
        ):
            assert torch.equal(here.tokens, there.tokens)
            assert here.pixels is not None and there.pixels is not None
            assert torch.equal(here.pixels, there.pixels)


def of_text(content: dict[str, object]) -> RandomAugmentation:
    words = Words(str(content["text"]), (), declared_in(content, str(content["text"])))
    return RandomAugmentation(
        AugmentConfig(crop=0.0, flip=1 - 1e-9, colour=0.0),
        lambda record: (Words("", ()), words),
        lambda text: list(text.encode()),
    )


def drawn_of(num_tokens: int) -> Drawn:
    segment = segment_of(image_bytes(framed((8, 8, 20, 20)), "png"), "image", "png")
    text = TextSegment(num_tokens=num_tokens, loss=True)
    record = SampleRecord(
        shard="x", key="0", kind="caption", source="", offset=0, num_bytes=1, segments=(segment, text)
    )
    return Drawn(key=5, number=0, record=record)


def test_a_text_of_another_length_keeps_its_picture() -> None:
    regions = [{"span": [0, 8], "kind": "point", "format": "pixels"}]
    same = of_text({"text": "(10, 20) x", "regions": regions})
    assert same.view(drawn_of(10)).flip
    assert bytes(same.tokens(drawn_of(10))[1]) == b"(46, 20) x"
    shorter = of_text({"text": "(50, 20) x", "regions": regions})
    assert shorter.view(drawn_of(10)) == AS_IT_IS
    assert not shorter.tokens(drawn_of(10))


def test_a_region_outside_of_its_picture_is_a_fault_of_its_words() -> None:
    point = {"span": [0, 8], "kind": "point", "format": "pixels"}
    outside = of_text({"text": "(99, 20)", "regions": [point]})
    assert outside.view(drawn_of(8)) == AS_IT_IS
    with pytest.raises(SampleError, match="outside of its picture"):
        outside.tokens(drawn_of(8))
    absent = of_text({"text": "(09, 20)", "regions": [point | {"media": 1}]})
    with pytest.raises(SampleError, match="of its media 1, it has 1"):
        absent.tokens(drawn_of(8))


def test_words_are_swapped_whole_and_in_their_case() -> None:
    assert swapped("Left of LEFT, leftover; left-hand, rightmost") == (
        "Right of RIGHT, leftover; right-hand, leftmost"
    )
    assert swapped("左边的狗,左右,顺时针") == "右边的狗,左右,逆时针"


def test_only_declared_spans_are_swapped_and_zeros_stay() -> None:
    text = "right: the left one at <0100><0020>"
    segment = segment_of(image_bytes(framed((8, 8, 20, 20)), "png"), "image", "png")
    region = {"span": [23, 35], "kind": "point", "format": "normalized_1000"}
    declared = declared_in({"regions": [region], "orientation": [[11, 15]]}, text)
    new = rewriting.rewritten(Words(text, (), declared), [View(flip=True)], [segment])
    assert new == "right: the right one at <0900><0020>"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"regions": 3}, "no list"),
        ({"regions": [{"span": [0, 99], "kind": "box", "format": "pixels"}]}, "within the 16 characters"),
        ({"regions": [{"span": [0, 16], "kind": "ball", "format": "pixels"}]}, "kind is one of"),
        ({"regions": [{"span": [0, 16], "kind": "point", "format": "pixels"}]}, "4 numbers instead of 2"),
        ({"regions": [{"span": [0, 16], "kind": "box", "format": "pixels"}]}, "not left, top"),
        ({"orientation": [[0, 3]]}, "has none of left"),
        ({"orientation": "yes"}, "neither true or false"),
    ],
)
def test_declarations_that_cannot_be_so_are_named(content: dict[str, object], words: str) -> None:
    assert declared_in({}, "9, 8, 1, 1 on it") is UNDECLARED
    with pytest.raises(DeclarationError, match=words):
        declared_in(content, "9, 8, 1, 1 on it")
