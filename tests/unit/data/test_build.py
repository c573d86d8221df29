"""Building a shard set: split by group, repeatable, never in the way of what is there."""

import hashlib
import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from k25_train.data.__main__ import main
from k25_train.data.formats.dataset import load_dataset
from k25_train.data.formats.records import TextSegment
from k25_train.data.smoke_set import build, splits
from k25_train.data.smoke_set.build import SMOKE_SOURCES, BuildOptions, build_dataset
from k25_train.data.tokenizer import load_tokenizer
from k25_train.errors import DataError
from tests.helpers.tiny_set_sources import NUM_CAPTIONS, NUM_DOCUMENTS, TINY_SOURCES, VOCAB_SIZE, build_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("build") / "tiny"
    assert build_tiny(out)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_sample_is_there_once_with_its_content(tiny: Path) -> None:
    dataset = load_dataset(str(tiny))
    records = [record for split in dataset.splits.values() for record in split]
    assert Counter(r.kind for r in records) == {"text": NUM_DOCUMENTS, "caption": NUM_CAPTIONS, "video": 12}
    assert len({record.key for record in records}) == len(records)
    record = next(r for r in records if r.key == "image-5")
    assert dataset.reader.read_texts(record)[1] == "a square of shade 5"
    media = record.media[0]
    assert (media.width, media.height, media.format) == (25, 35, "png")
    clip = next(r for r in records if r.key == "clip-3").media[0]
    assert (clip.num_frames, clip.duration_s) == (8, 4.0)


def test_token_counts_are_the_tokenizers(tiny: Path) -> None:
    dataset = load_dataset(str(tiny))
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    for record in dataset.splits["train"][:30]:
        for segment, text in zip(record.segments, dataset.reader.read_texts(record), strict=True):
            if isinstance(segment, TextSegment):
                assert segment.num_tokens == len(tokenizer.encode(text)) > 0


def test_both_splits_are_used_and_groups_stay_together(tiny: Path) -> None:
    splits = load_dataset(str(tiny)).splits
    groups = {
        name: {int(r.key.split("-")[1]) // 2 for r in records if r.kind == "caption"}
        for name, records in splits.items()
    }
    assert groups["heldout"]
    assert not groups["heldout"] & groups["train"]
    assert 0 < len(splits["heldout"]) < len(splits["train"]) / 4


def test_the_tokenizer_has_not_seen_the_heldout_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def record_texts(texts: Any, vocab_size: int, path: Path, **_: Any) -> None:
        seen.extend(texts)
        raise DataError("enough")

    monkeypatch.setattr(build, "train_tokenizer", record_texts)
    with pytest.raises(DataError, match="enough"):
        build_tiny(tmp_path / "set")
    samples = [sample for source in TINY_SOURCES for sample in source.samples({})]
    heldout = {s.parts[0].text for s in samples if s.kind == "text" and splits.split_of(s) == "heldout"}
    assert heldout
    assert not heldout & set(seen)


def test_two_builds_are_equal_byte_by_byte(tiny: Path, tmp_path: Path) -> None:
    build_tiny(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tiny)


def test_checksums_are_those_of_sha256sum(tiny: Path) -> None:
    result = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tiny, capture_output=True, check=False)
    assert result.returncode == 0
    assert result.stdout.count(b": OK") == len(list(tiny.iterdir())) - 1


def test_licences_are_recorded(tiny: Path) -> None:
    manifest = json.loads((tiny / "dataset.json").read_text())
    assert {source["name"]: source["licence"] for source in manifest["sources"]} == {
        "docs": "CC0-1.0",
        "images": "CC0-1.0",
        "clips": "CC0-1.0",
    }
    assert "## images\n\nLicence: `CC0-1.0`" in (tiny / "LICENSES.md").read_text()


def test_large_splits_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "MAX_SHARD_BYTES", 4000)
    build_tiny(tmp_path / "set")
    dataset = load_dataset(str(tmp_path / "set"))
    assert len({record.shard for record in dataset.splits["train"]}) > 3
    assert sum(len(records) for records in dataset.splits.values()) == NUM_DOCUMENTS + NUM_CAPTIONS + 12


def test_a_set_that_is_there_stays_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "set"
    build_tiny(out)
    (out / "LICENSES.md").write_text("changed")
    assert not build_tiny(out)
    assert (out / "LICENSES.md").read_text() == "changed"
    assert build_tiny(out, force=True)
    assert (out / "LICENSES.md").read_text() != "changed"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_another_vocabulary_size_is_not_silently_the_old_one(tmp_path: Path) -> None:
    build_tiny(tmp_path / "set")
    with pytest.raises(DataError, match=rf"vocabulary of {VOCAB_SIZE}, and 300 was asked for\. Add --force"):
        build_tiny(tmp_path / "set", vocab_size=300)


def test_a_folder_of_other_things_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="is no shard set"):
        build_tiny(tmp_path / "set", force=True)
    assert (tmp_path / "set" / "thesis.txt").read_text() == "years of work"


def test_a_build_that_fails_leaves_the_old_set_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "set"
    build_tiny(out)
    before = contents(out)
    with pytest.raises(DataError, match="vocabulary of 100000"):
        build_tiny(out, vocab_size=100_000, force=True)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["downloads", "set"]


def test_commands_report_errors_in_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("DataError: ")
    assert str(tmp_path / "dataset.json") in error


def test_inspect_shows_counts_samples_and_pictures(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tiny)]) == 0
    assert "CC0-1.0" in capsys.readouterr().out
    sheet = tmp_path / "sheet.png"
    assert (
        main(["inspect", str(tiny), "--show", "2", "--kind", "caption", "--contact-sheet", str(sheet)]) == 0
    )
    assert "a square of shade" in capsys.readouterr().out
    assert sheet.stat().st_size > 1000


@pytest.mark.slow
def test_the_smoke_set_holds_what_it_promises(tmp_path: Path) -> None:
    """Downloads the packages (about 140 MB) unless the checkout's own downloads folder has them."""
    checkout = Path(__file__).parents[3]
    options = BuildOptions(out=tmp_path / "smoke", downloads=checkout / "datasets" / "downloads")
    assert build_dataset(options, print)
    dataset = load_dataset(str(options.out))
    records = [record for split in dataset.splits.values() for record in split]
    text_bytes = sum(r.num_bytes for r in records if r.kind == "text")
    captioned = [r.media[0] for r in records if r.kind == "caption"]
    clips = [r.media[0] for r in records if r.kind == "video"]
    assert text_bytes >= 5_000_000
    assert len(captioned) >= 1000
    assert len({(m.width, m.height) for m in captioned}) >= 100
    assert len(clips) >= 24
    assert min(m.num_frames for m in clips) >= 8
    for split in dataset.splits.values():
        assert {record.source for record in split} == {source.name for source in SMOKE_SOURCES}
    assert sum(path.stat().st_size for path in options.out.iterdir()) < 60e6
    assert main(["verify", str(options.out)]) == 0
    sums = {hashlib.sha256(p.read_bytes()).hexdigest() for p in options.out.glob("*.tar")}
    assert len(sums) == len(list(options.out.glob("*.tar")))
