"""Every fault that a shard set can have is found, and named by file and sample."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k25_train.data.__main__ import main
from k25_train.data.formats.dataset import write_manifest
from k25_train.data.formats.index import parse_index
from k25_train.data.formats.records import SampleRecord
from k25_train.data.formats.shard_writer import MediaPart, ShardWriter, TextPart
from k25_train.data.smoke_set.verify import verify_dataset
from k25_train.data.tokenizer import load_tokenizer
from tests.helpers.tiny_set_sources import build_tiny, png
from tests.helpers.tiny_shards import make_video

SHARD = "train-00000.tar"
INDEX = "train-00000.index.jsonl"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "set"
    build_tiny(out)
    return out


@pytest.fixture
def broken(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "set"))


def records_of(folder: Path) -> list[SampleRecord]:
    return parse_index(INDEX, (folder / INDEX).read_bytes())[1]


def first(folder: Path, kind: str) -> SampleRecord:
    return next(r for r in records_of(folder) if r.kind == kind)


def faults_of(folder: Path) -> str:
    """All faults but those of checksums, which are renewed first: the content must give the fault away."""
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    names = [line.partition("  ")[2] for line in lines]
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(sums))
    return "\n".join(verify_dataset(folder, lambda line: None))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def edit_index(folder: Path, key: str, change: Callable[[dict[str, Any]], None]) -> None:
    lines = (folder / INDEX).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines[1:], start=1):
        fields = json.loads(line)
        if fields["key"] == key:
            change(fields)
            lines[number] = json.dumps(fields)
    (folder / INDEX).write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_a_whole_set_has_no_fault(pristine: Path) -> None:
    reports: list[str] = []
    assert verify_dataset(pristine, reports.append) == []
    assert reports == ["train-00000.tar: no faults", "heldout-00000.tar: no faults"]
    assert main(["verify", str(pristine)]) == 0


def test_a_truncated_image(broken: Path) -> None:
    record = first(broken, "caption")
    media = record.media[0]
    overwrite(broken / SHARD, media.offset + media.num_bytes // 2, bytes(media.num_bytes // 2))
    faults = faults_of(broken)
    assert f"{SHARD}, sample {record.key}: {record.key}.0.png does not decode" in faults
    assert len(faults.splitlines()) == 1


def test_a_truncated_video(broken: Path) -> None:
    record = first(broken, "video")
    media = record.media[0]
    overwrite(broken / SHARD, media.offset, b"no GIF at all")
    assert f"sample {record.key}: {record.key}.0.gif does not decode" in faults_of(broken)


def rewrite_train_split(folder: Path, kind: str, parts: list[TextPart | MediaPart]) -> None:
    """Put one sample, orderly written, in the place of the train split."""
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    with ShardWriter(folder / SHARD, tokenizer.sha256) as writer:
        writer.add("bad", kind, "source", "CC0-1.0", parts)
    write_manifest(folder, "tokenizer.json", {"train": [SHARD]}, [])


def caption_of(folder: Path, text: str) -> TextPart:
    return TextPart(text=text, num_tokens=len(load_tokenizer(folder / "tokenizer.json").encode(text)))


def test_an_empty_file(broken: Path) -> None:
    image = MediaPart(type="image", data=b"", format="png", width=1, height=1)
    rewrite_train_split(broken, "caption", [image, caption_of(broken, "nothing")])
    assert faults_of(broken) == f"{broken / SHARD}, sample bad: bad.0.png is empty"


def test_a_caption_without_an_image(broken: Path) -> None:
    rewrite_train_split(broken, "caption", [caption_of(broken, "a bird")])
    assert faults_of(broken) == f"{broken / SHARD}, sample bad: is of kind caption without an image or video"


def test_an_image_without_a_caption(broken: Path) -> None:
    image = MediaPart(type="image", data=png(9, 9, 0), format="png", width=9, height=9)
    rewrite_train_split(broken, "caption", [image])
    assert faults_of(broken) == f"{broken / SHARD}, sample bad: has no text"


def test_frames_at_other_times(broken: Path) -> None:
    data = make_video(28, 28, "gif", num_frames=4, fps=4, seed=1).data
    clip = MediaPart(
        type="video",
        data=data,
        format="gif",
        width=28,
        height=28,
        num_frames=4,
        duration_s=1.0,
        frame_times="1/10 1x3 7",
    )
    rewrite_train_split(broken, "video", [clip, caption_of(broken, "words")])
    assert faults_of(broken) == (
        f"{broken / SHARD}, sample bad: bad.0.gif shows its frames at other times than the index says"
    )


def test_a_changed_picture_that_still_decodes(broken: Path) -> None:
    record = first(broken, "video")
    media = record.media[0]
    # A GIF's comment or palette may change without an error: here the background colour's index.
    overwrite(broken / SHARD, media.offset + 11, b"\x01")
    assert f"{record.key}.0.gif has another CRC-32 than the index says" in faults_of(broken)


def test_an_image_that_the_sample_does_not_have(broken: Path) -> None:
    record = first(broken, "caption")
    data = (broken / SHARD).read_bytes()[record.offset : record.offset + record.num_bytes]
    overwrite(broken / SHARD, record.offset, data.replace(b'"0.png"', b'"7.png"'))
    assert f"has no image {record.key}.7.png" in faults_of(broken)


def test_a_shard_cut_short(broken: Path) -> None:
    path = broken / SHARD
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    faults = faults_of(broken)
    assert f"{path}: has {size // 2} bytes, its index says {size}" in faults
    last = records_of(broken)[-1]
    assert f"sample {last.key}: no {last.key}.json" in faults


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda fields: fields["segments"][0].update(width=9), "the index says 9x"),
        (lambda fields: fields["segments"][0].update(offset=1), "the index says"),
        (lambda fields: fields["segments"][1].update(num_tokens=99), "tokens, the index says 99"),
        (lambda fields: fields["segments"][1].update(loss=False), "a text segment differs"),
        (lambda fields: fields.update(offset=1024), "at byte 1024, as the index says"),
        (lambda fields: fields.update(source="elsewhere"), "kind, source or both"),
        (lambda fields: fields.update(key="renamed"), "belongs to no sample of the index"),
    ],
)
def test_a_wrong_index(broken: Path, change: Callable[[dict[str, Any]], None], fault: str) -> None:
    edit_index(broken, first(broken, "caption").key, change)
    assert fault in faults_of(broken)


def test_an_index_cut_short(broken: Path) -> None:
    lines = (broken / INDEX).read_text(encoding="utf-8").splitlines()
    (broken / INDEX).write_text("\n".join(lines[:-3]) + "\n", encoding="utf-8")
    assert f"{broken / INDEX}: holds {len(lines) - 4} samples" in faults_of(broken)


def test_a_changed_byte_that_nothing_else_shows(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (broken / "LICENSES.md").write_text("all mine")
    assert main(["verify", str(broken)]) == 1
    out = capsys.readouterr().out
    assert f"{broken / 'LICENSES.md'}: content is not that of its checksum" in out
    assert "1 fault found" in out


def test_missing_files(broken: Path) -> None:
    (broken / SHARD).unlink()
    faults = "\n".join(verify_dataset(broken, lambda line: None))
    assert f"{broken / SHARD}: missing" in faults
    assert len(faults.splitlines()) == 2
    (broken / "dataset.json").unlink()
    assert "dataset.json: no such file" in verify_dataset(broken, lambda line: None)[0]
