"""A broken text is a skipped sample with its reason: in a run, and where a set is checked or written."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from k25_train.data.formats.shard_writer import ShardWriter, TextPart
from k25_train.data.loader import DataLoader
from k25_train.data.smoke_set.verify import verify_dataset
from k25_train.errors import DataError
from tests.helpers.smoke_mix import shard_sources
from tests.helpers.tiny_shards import (
    Sample,
    all_words,
    make_image,
    make_text,
    tiny_data_config,
    tiny_samples,
    tiny_train_config,
    tiny_vision_config,
    write_shard_set,
)

MARK = "XXXXXX"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    broken = [
        Sample("broken-text", "text", [make_text(60, 5) + MARK]),
        Sample("broken-caption", "caption", [make_image(40, 28, "png", 3), "red " + MARK]),
    ]
    samples = [*tiny_samples(2, seed=0), *broken]
    folder = tmp_path_factory.mktemp("pristine") / "set"
    return write_shard_set(folder, {"train": samples, "heldout": samples})


def with_broken(folder: Path, edit: Callable[[bytes], bytes]) -> None:
    """Give one text and one caption the bytes that `edit` makes of their JSON, as many as it has."""
    for shard in folder.glob("*.tar"):
        lines = shard.with_name(shard.stem + ".index.jsonl").read_text().splitlines()[1:]
        data = bytearray(shard.read_bytes())
        for record in map(json.loads, lines):
            if record["key"].startswith("broken"):
                span = slice(record["offset"], record["offset"] + record["bytes"])
                changed = edit(bytes(data[span]))
                assert len(changed) == record["bytes"]
                data[span] = changed
        shard.write_bytes(data)


def wrap(data: bytes, before: bytes, after: bytes) -> bytes:
    """Other JSON of the same length."""
    return before + b" " * (len(data) - len(before) - len(after)) + after


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "half a surrogate pair": (
        lambda data: data.replace(MARK.encode(), rb"\ud83d"),
        r"the text of its segment \d has half of a surrogate pair \(U\+D83D\) at character \d+",
    ),
    "no UTF-8": (lambda data: data.replace(MARK.encode(), b"\xff" * 6), r"its JSON is not UTF-8 \(byte \d"),
    "cut UTF-8": (lambda data: data.replace(MARK.encode(), b"XXXX\xe6\xbc"), "its JSON is not UTF-8"),
    "NaN": (lambda data: data.replace(b'"loss": true', b'"loss": NaN '), "NaN is not JSON"),
    "a key twice": (lambda data: data.replace(b'"loss"', b'"text"'), "key 'text' is there twice"),
    "deep nesting": (lambda data: b"[" * len(data), "no sample JSON|nested too deeply"),
    "a list": (lambda data: wrap(data, b"[", b"]"), "its JSON is a list"),
    "no segments": (lambda data: wrap(data, b"{", b"}"), "its JSON has no list of segments"),
    "too few segments": (lambda data: wrap(data, b'{"segments": [', b"]}"), "has 0 segments, the index says"),
    "a number": (
        lambda data: wrap(data, b'{"segments": [{"text": 12}, {"text": 12}]}', b"")
        if b'"image"' in data
        else wrap(data, b'{"segments": [{"text": 12}]}', b""),
        r"the text of its segment \d is a int",
    ),
    "no text": (
        lambda data: data.replace(b'"text": "', b'"Text": "'),
        r"the text of its segment \d is missing",
    ),
    "other words": (lambda data: data.replace(MARK.encode(), rb"\u0041"), r"changed since it was indexed"),
    "zeros": (lambda data: bytes(len(data)), "no sample JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_text_is_skipped_and_named(
    pristine: Path, tmp_path: Path, edit: Callable[[bytes], bytes], reason: str
) -> None:
    folder = Path(shutil.copytree(pristine, tmp_path / "set"))
    with_broken(folder, edit)

    # 1. The run goes on without the two samples, which keep their place and are not learned.
    def steps_of(max_skipped_samples: int) -> DataLoader:
        data = replace(
            tiny_data_config(folder),
            sources=shard_sources(text=0.5, caption=0.5),
            max_skipped_samples=max_skipped_samples,
        )
        loader = DataLoader(data, tiny_train_config(), tiny_vision_config())
        for step in range(3):
            for batch in loader.micro_batches(
                loader.plan(step), dp_rank=0, dp_size=1, reads=all_words(with_pixels=True)
            ):
                assert batch.tokens.shape == (256,)
                documents = batch.tokens.split(batch.document_lengths)
                for position, tokens in enumerate(documents):
                    assert position in batch.padding or loader.tokenizer.pad not in tokens
        return loader

    skipped = steps_of(2).skip_log.skipped
    assert {name.rpartition(" ")[2] for name in skipped} == {"broken-text", "broken-caption"}

    # 2. They count against the limit, and `verify` names them.
    with pytest.raises(DataError, match=rf"train-00000.tar, sample broken-\w+: .*({reason})"):
        steps_of(1)
    faults = "\n".join(verify_dataset(folder, lambda line: None))
    assert "train-00000.tar, sample broken-text: " in faults
    assert "heldout-00000.tar, sample broken-caption: " in faults


def test_text_with_nul_and_odd_characters_is_text(tmp_path: Path) -> None:
    text = "a\0b \x1f\x85\u2028\ufeff\ufffd\U0010ffff e\u0301"
    folder = write_shard_set(tmp_path / "set", {"train": [Sample("odd", "text", [text])]})
    data = replace(tiny_data_config(folder), sources=shard_sources(text=1.0))

    with DataLoader(data, tiny_train_config(), tiny_vision_config()) as loader:
        record = loader.sources["text"].training.record(0)
        plan = loader.plan(0)
        batch = loader.micro_batches(plan, dp_rank=0, dp_size=1, reads=all_words(with_pixels=False))[0]
        words = batch.tokens[1 : 1 + record.num_text_tokens].tolist()

    assert loader.tokenizer.decode(words) == text
    assert not loader.skip_log.skipped


def test_half_a_surrogate_pair_is_not_written(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train-00000.tar", "0" * 64) as writer:
        writer.add("good", "text", "s", "CC0-1.0", [TextPart(text="red", num_tokens=1)])
        with pytest.raises(DataError, match=r"sample 'bad' has half of a surrogate pair \(U\+DE00\)"):
            writer.add("bad", "text", "s", "CC0-1.0", [TextPart(text="red \ude00", num_tokens=2)])

    assert "bad" not in (tmp_path / "train-00000.index.jsonl").read_text()
