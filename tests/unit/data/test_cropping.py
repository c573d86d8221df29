"""What a container crops of its video is not shown."""

import struct

import pytest
from PIL import Image

from k25_train.data.decode.cropping import NOTHING_CROPPED, Cropping, container_cropping
from k25_train.data.decode.frames import probe_media
from k25_train.errors import DataError
from tests.helpers.media_files import Clip, corners, first_picture

QUARTER_TURN = (0, 1, -1, 0)


def with_clean_aperture(mp4: bytes, *values: int) -> bytes:
    """Insert a `clap` box into the only sample entry; the media data before it stay where they are."""
    box = struct.pack(">I4s8i", 40, b"clap", *values)
    data, entry = bytearray(mp4), mp4.index(b"mp4v") - 4
    end = entry + int.from_bytes(mp4[entry : entry + 4])
    for at in [
        entry,
        *(mp4.index(name) - 4 for name in (b"stsd", b"stbl", b"minf", b"mdia", b"trak", b"moov")),
    ]:
        data[at : at + 4] = (int.from_bytes(data[at : at + 4]) + len(box)).to_bytes(4)
    return bytes(data[:end]) + box + bytes(data[end:])


def element(identifier: int, content: bytes) -> bytes:
    """Of a Matroska file, its size in four bytes."""
    head = identifier.to_bytes(-(-identifier.bit_length() // 8))
    return head + (len(content) | 1 << 28).to_bytes(4) + content


def test_the_container_crops_the_picture() -> None:
    picture = Image.new("RGB", (96, 64), "white")
    picture.paste("red", (16, 8, 96, 64))
    mp4 = with_clean_aperture(Clip().encode([picture]), 80, 1, 56, 1, 8, 1, 4, 1)
    turned = with_clean_aperture(Clip(turn=QUARTER_TURN).encode([picture]), 80, 1, 56, 1, 8, 1, 4, 1)

    for data, size in ((mp4, (80, 56)), (turned, (56, 80))):
        info = probe_media(data, "video", "mp4")
        shown = first_picture(data, "video", "mp4")
        assert (info.width, info.height) == size
        assert shown.shape == (size[1], size[0], 3)
        assert (shown[..., 0] > 200).all() and (shown[2:-2, 2:-2, 1] < 60).all(), "no white is left"


def test_cropping_of_matroska_is_read() -> None:
    video = (
        element(0xB0, b"\x60")
        + element(0x54BB, b"\x08")
        + element(0x54CC, b"\x01\x10")
        + element(0x54AA, b"\2")
    )
    track = element(0xAE, element(0x83, b"\1") + element(0xE0, video))
    head = element(0x1A45DFA3, element(0x4282, b"matroska"))
    segment = element(0x114D9B74, b"seek") + element(0x1654AE6B, track) + element(0x1F43B675, b"cluster")
    unknown_size = bytes.fromhex("18538067") + b"\x01" + b"\xff" * 7

    for data in (head + element(0x18538067, segment), head + unknown_size + segment):
        assert container_cropping(data) == Cropping(left=272, top=8, right=0, bottom=2)
    plain = Clip(container="matroska").encode([corners(96, 64)])
    assert container_cropping(plain) == NOTHING_CROPPED
    for length in range(0, len(plain), 7):  # cut or damaged structure never raises
        assert container_cropping(plain[:length]) == NOTHING_CROPPED


def test_cropping_to_nothing_is_refused() -> None:
    data = with_clean_aperture(Clip().encode([corners(96, 64)]), 200, 1, 56, 1, 0, 1, 0, 1)

    with pytest.raises(DataError, match="cropped to nothing, or beyond its 96x64"):
        probe_media(data, "video", "mp4")
