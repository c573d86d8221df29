"""A shard set from anyone reads and writes nothing outside of its folder, and states nothing that costs more
than its bytes: a test for each way in."""

import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k25_train.data.decode.frames import probe_media
from k25_train.data.formats.dataset import MANIFEST, load_dataset
from k25_train.data.smoke_set.verify import verify_dataset
from k25_train.errors import DataError
from tests.helpers.tiny_shards import Sample, make_image, make_video, write_shard_set

SHARD, INDEX = "train-00000.tar", "train-00000.index.jsonl"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [
        Sample("text", "text", ["red green blue"]),
        Sample("caption", "caption", [make_image(40, 28, "png", seed=1), "red"]),
        Sample("video", "video", [make_video(28, 28, "gif", num_frames=4, fps=4, seed=2), "blue"]),
    ]
    return write_shard_set(tmp_path_factory.mktemp("pristine") / "set", {"train": samples})


@pytest.fixture
def foreign(pristine: Path, tmp_path: Path) -> Path:
    """A set of one text, one caption and one video, next to a file that is none of its business."""
    (tmp_path / "secret.json").write_text('{"model": "secret"}')
    return Path(shutil.copytree(pristine, tmp_path / "set"))


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    edit(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


PLACES = {
    "absolute": "/etc/passwd",
    "parent": "../secret.json",
    "parent further in": "a/../../secret.json",
    "URL": "file:///etc/passwd",
    "other URL": "http://localhost/x.tar",
    "chain": "simplecache::x.tar",
    "backslashes": "..\\secret.json",
    "NUL": "train\0.tar",
    "line break": "train\n.tar",
    "empty": "",
    "the folder": ".",
    "number": 7,
    "list": ["x"],
}


@pytest.mark.parametrize("name", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("field", ["shard", "index", "tokenizer"])
def test_names_that_lead_out_of_the_folder_are_refused(foreign: Path, field: str, name: object) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        entry = manifest if field == "tokenizer" else manifest["splits"]["train"][0]
        entry[field] = name

    edit_manifest(foreign, edit)

    with pytest.raises(DataError, match=r"names a file .*in its folder"):
        load_dataset(str(foreign))
    assert "names a file" in verify_dataset(foreign, lambda line: None)[0]


@pytest.mark.parametrize("name", [SHARD, INDEX, "tokenizer.json", MANIFEST])
@pytest.mark.parametrize("is_relative", [False, True])
def test_links_that_leave_the_folder_are_refused(foreign: Path, name: str, is_relative: bool) -> None:
    outside = foreign.parent / f"outside-{name}"
    (foreign / name).rename(outside)
    (foreign / name).symlink_to(Path("..") / outside.name if is_relative else outside)

    with pytest.raises(DataError, match=rf"{name}: is a link to .*outside-{name}, outside of its shard set"):
        load_dataset(str(foreign))


def test_a_folder_inside_that_is_a_link_elsewhere_is_refused(foreign: Path) -> None:
    (foreign / "shards").symlink_to(foreign.parent)
    edit_manifest(foreign, lambda manifest: manifest.update(tokenizer="shards/secret.json"))

    with pytest.raises(DataError, match=r"shards/secret\.json: is a link"):
        load_dataset(str(foreign))


def test_links_within_the_folder_and_a_link_to_the_folder_are_fine(foreign: Path) -> None:
    (foreign / SHARD).rename(foreign / "real.tar")
    (foreign / SHARD).symlink_to("real.tar")
    (foreign.parent / "link").symlink_to(foreign)

    assert len(load_dataset(str(foreign.parent / "link")).splits["train"]) == 3


@pytest.mark.parametrize("name", [SHARD, INDEX, "tokenizer.json", MANIFEST])
def test_a_pipe_that_nobody_writes_to_is_refused_at_once(foreign: Path, name: str) -> None:
    (foreign / name).unlink()
    os.mkfifo(foreign / name)

    with pytest.raises(DataError, match=f"{name}: is no regular file"):
        load_dataset(str(foreign))


LINES: dict[str, tuple[int, Callable[[dict[str, Any]], object], str]] = {
    "negative offset": (1, lambda r: r.update(offset=-512), "offset=-512 is negative"),
    "negative length": (1, lambda r: r.update(bytes=-1), "bytes=-1 is negative"),
    "offset behind the end": (1, lambda r: r.update(offset=10**15), "end behind the shard's"),
    "length over the end": (1, lambda r: r.update(bytes=10**12), "end behind the shard's"),
    "offset that is true": (1, lambda r: r.update(offset=True), "offset=True is no whole number"),
    "offset as text": (1, lambda r: r.update(offset="0"), "offset='0' is no whole number"),
    "too many tokens": (1, lambda r: r["segments"][0].update(num_tokens=10**12), "num_tokens=10* in all"),
    "negative tokens": (1, lambda r: r["segments"][0].update(num_tokens=-1), "num_tokens=-1 is negative"),
    "fractions of tokens": (1, lambda r: r["segments"][0].update(num_tokens=1.5), "num_tokens=1.5 is no"),
    "loss as text": (1, lambda r: r["segments"][0].update(loss="no"), "loss='no' is neither"),
    "terminal codes in a key": (1, lambda r: r.update(key="\x1b]0;x\x07"), "has control characters"),
    "media elsewhere": (2, lambda r: r["segments"][0].update(offset=10**15), "end behind the shard's"),
    "media of another shard": (2, lambda r: r["segments"][0].update(shard="/etc/passwd"), "shard"),
    "width as text": (2, lambda r: r["segments"][0].update(width="40"), "not a sample record"),
    "no frames": (3, lambda r: r["segments"][0].update(num_frames=0), "impossible sizes"),
    "too many frames": (
        3,
        lambda r: r["segments"][0].update(
            num_frames=10**12, duration_s=2.5e11, frame_times=f"1/4 1x{10**12}"
        ),
        "num_frames=10* are",
    ),
    "endless": (3, lambda r: r["segments"][0].update(duration_s=float("inf")), "impossible sizes"),
    "not a number of seconds": (3, lambda r: r["segments"][0].update(duration_s=float("nan")), "impossible"),
}  # fmt: skip


@pytest.mark.parametrize(("number", "edit", "message"), LINES.values(), ids=LINES.keys())
def test_index_line_that_the_shard_cannot_hold_is_refused(
    foreign: Path, number: int, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    lines = (foreign / INDEX).read_text().splitlines()
    record = json.loads(lines[number])
    edit(record)
    lines[number] = json.dumps(record)
    (foreign / INDEX).write_text("\n".join(lines) + "\n")

    with pytest.raises(DataError, match=rf"{INDEX}, line {number + 1}: .*{message}"):
        load_dataset(str(foreign))


RAW_LINES = {
    "nesting": b"[" * 200_000,
    "no UTF-8": b'{"key": "\xff"}',
    "a list": b"[]",
    "null": b"null",
    "a number of many digits": b'{"segments": [], "bytes": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("line", RAW_LINES.values(), ids=RAW_LINES.keys())
@pytest.mark.parametrize("number", [0, 2])
def test_index_line_that_is_no_record_is_refused(foreign: Path, number: int, line: bytes) -> None:
    lines = (foreign / INDEX).read_bytes().splitlines()
    lines[number] = line
    (foreign / INDEX).write_bytes(b"\n".join(lines) + b"\n")

    with pytest.raises(DataError, match=f"{INDEX}, line {number + 1}: not "):
        load_dataset(str(foreign))


@pytest.mark.parametrize(
    "content", [b"[" * 200_000, b"\xff\xfe", b"null", pickle.dumps({"format_version": 1})]
)
def test_manifest_that_is_no_json_object_is_refused(foreign: Path, content: bytes) -> None:
    (foreign / MANIFEST).write_bytes(content)

    with pytest.raises(DataError, match=MANIFEST):
        load_dataset(str(foreign))


def test_verify_names_members_that_would_leave_a_folder_when_unpacked(foreign: Path) -> None:
    outside = tarfile.TarInfo("../../outside.json")
    link = tarfile.TarInfo("link.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(foreign / SHARD, "a") as tar:
        tar.addfile(outside, io.BytesIO())
        tar.addfile(link)

    faults = "\n".join(verify_dataset(foreign, lambda line: None))

    assert f"{SHARD}, member '../../outside.json': is a link, no file, or leads out of the shard" in faults
    assert f"{SHARD}, member 'link.json': is a link" in faults


def test_a_tokenizer_of_the_set_that_is_a_pickle_is_data(foreign: Path) -> None:
    (foreign / "tokenizer.json").write_bytes(pickle.dumps("x"))

    with pytest.raises(DataError, match="tokens were counted with tokenizer"):
        load_dataset(str(foreign))


def test_a_playlist_in_place_of_a_video_opens_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    video = make_video(64, 48, "mp4", num_frames=4, fps=4, seed=1).data
    (tmp_path / "other.mp4").write_bytes(video)
    (tmp_path / "other.ts").write_bytes(video)
    url = f"file://{tmp_path}/other.ts"
    playlists = [
        "ffconcat version 1.0\nfile other.mp4\n",
        f"ffconcat version 1.0\nfile {tmp_path}/other.mp4\n",
        *(
            f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{name}\n#EXT-X-ENDLIST\n"
            for name in ("other.ts", url, "http://127.0.0.1:9/other.ts")
        ),
    ]

    for playlist in playlists:
        with pytest.raises(DataError, match="does not decode"):
            probe_media(playlist.encode(), "video", "mp4")
    assert probe_media(video, "video", "mp4").num_frames == 4


def test_a_script_in_place_of_an_image_is_not_run() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 10 10 rectfill\n"

    with pytest.raises(DataError, match="does not decode"):
        probe_media(postscript, "image", "png")
