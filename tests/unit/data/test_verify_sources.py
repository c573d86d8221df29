"""Sources of tar shards are indexed and verified by commands, and every fault is named with its place."""

import json
from pathlib import Path

import pytest
from PIL import Image

from k25_train.data.__main__ import main
from k25_train.data.tokenizer import train_tokenizer
from k25_train.data.verify import twins
from tests.helpers.media_files import image_bytes
from tests.helpers.tar_shards import picture, tar_bytes
from tests.helpers.tiny_shards import VOCAB_SIZE, make_text

DATA = """dir: {folder}
tokenizer: tokenizer.json
sources:
  pictures: {{format: webdataset, path: "s-{{0..1}}.tar"}}
  questions: {{format: energon, path: energon}}
"""
DATASET = """sample_type: {__module__: megatron.energon, __class__: CaptioningSample}
field_map: {image: jpg, caption: txt}
"""


@pytest.fixture
def data(tmp_path: Path) -> str:
    train_tokenizer([make_text(400, seed) for seed in range(4)], VOCAB_SIZE, tmp_path / "tokenizer.json")
    for number in range(2):
        members = [
            (f"{number}{key}.{kind}", each)
            for key in "ab"
            for kind, each in (("jpg", picture()), ("txt", key))
        ]
        (tmp_path / f"s-{number}.tar").write_bytes(tar_bytes(members))
    meta = tmp_path / "energon" / ".nv-meta"
    meta.mkdir(parents=True)
    (meta / ".info.json").write_text(json.dumps({"shard_counts": {"0.tar": 2, "1.tar": 1}}))
    (meta / "split.yaml").write_text("split_parts: {train: [0.tar], val: [1.tar]}\nexclude: [0.tar/x]\n")
    (meta / "dataset.yaml").write_text(DATASET)
    for number, keys in enumerate(("xy", "z")):
        members = [
            (f"{key}.{kind}", each) for key in keys for kind, each in (("jpg", picture()), ("txt", key))
        ]
        (tmp_path / "energon" / f"{number}.tar").write_bytes(tar_bytes(members))
    (tmp_path / "data.yaml").write_text(
        DATA.format(folder=tmp_path).replace("tokenizer.json", f"{tmp_path}/tokenizer.json")
    )
    return f"data={tmp_path}/data.yaml"


def verified(data: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["verify", data, "--json", "--workers", "0"])
    found = json.loads(capsys.readouterr().out)
    return status, "\n".join(fault for source in found["sources"] for fault in source["faults"])


def test_what_is_sound_has_no_fault(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", data, "--workers", "0"]) == 0
    assert "questions: 2 samples" in capsys.readouterr().out
    assert main(["verify", data, "--workers", "0"]) == 0
    assert "no faults found" in capsys.readouterr().out
    assert verified(data, capsys) == (0, "")


def test_every_fault_is_named(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = image_bytes(Image.effect_noise((60, 60), 90), "JPEG")
    (tmp_path / "s-0.tar").write_bytes(
        tar_bytes(
            [
                *(("0a.jpg", noise[:-300]), ("0a.txt", "a"), ("empty.jpg", b""), ("empty.txt", "c")),
                *(("1b.jpg", picture()), ("1b.txt", "c"), ("bare.jpg", picture())),
                *(("1a.jpg", picture()), ("1a.txt", "a"), ("1b.jpg", noise), ("1b.txt", "d")),
            ]
        )
    )
    assert main(["index", data, "--workers", "0"]) == 0
    shard = tmp_path / "energon" / "1.tar"
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"z" + bytes(511), b"q" + bytes(511)))
    (tmp_path / "energon" / "0.tar").write_bytes((tmp_path / "energon" / "0.tar").read_bytes()[:2000])

    status, faults = verified(data, capsys)

    assert status == 1
    for fault in (
        r"pictures: s-0.tar, sample 0a \(byte \d+\): its image .* image file is truncated",
        r"s-0.tar, sample 'empty' \(byte \d+\): its .jpg at byte \d+ is empty",
        r"s-0.tar, sample 'bare' \(byte \d+\): has no text",
        r"s-0.tar, sample '1b' \(byte \d+\): has the stem of an earlier sample",
        r"s-1.tar, sample 1a \(byte \d+\): is the same as the sample at byte \d+ of s-0.tar",
        r"questions: 0.tar: has 2000 bytes but had \d+ when it was indexed",
        r"0.tar, sample y \(byte \d+\): .*cut short",
        r"1.tar, sample z \(byte \d+\): changed since it was indexed",
    ):
        with pytest.raises(AssertionError, match=fault):
            raise AssertionError(faults)
    assert "s-1.tar, sample 1b" not in faults, "other samples of another file may have the name"


def test_files_may_number_their_samples_alike(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        members = [(f"{key}.txt", f"{number} {key}") for key in ("000", "001", f"10{number}")]
        (tmp_path / f"s-{number}.tar").write_bytes(tar_bytes(members))
    assert main(["index", data, "--workers", "0"]) == 0
    assert verified(data, capsys) == (0, "")
    assert main(["verify", data, "--workers", "0"]) == 0
    line = "warning: pictures: s-0.tar and s-1.tar have 2 names in common, of different samples"
    assert line in capsys.readouterr().out
    monkeypatch.setattr(twins, "LISTED_TWINS", 0)
    assert main(["verify", data, "--workers", "0"]) == 0
    assert "and 1 more pairs of files have" in capsys.readouterr().out
