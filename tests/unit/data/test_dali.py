"""DALI shows what the reference shows, within the stated bound; what it cannot is left to the reference."""

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from k25_train.config.data import Decoder
from k25_train.config.vision import VisionConfig
from k25_train.data.decode import dali
from k25_train.data.decode.dali import MAX_DIFFERENCE, MAX_MEAN_DIFFERENCE, DaliImages
from k25_train.data.decode.decoder import (
    DaliDecoder,
    Decoded,
    MediaFile,
    ReferenceDecoder,
    build_decoder,
    decoder_versions,
)
from k25_train.data.decode.items import plan_media
from k25_train.errors import ConfigError
from tests.helpers.media_files import image_bytes, segment_of
from tests.helpers.tiny_shards import make_picture, make_video, tiny_vision_config

pytest.importorskip("nvidia.dali")
LARGE = replace(tiny_vision_config(), image_patch_limit=16384, side_patch_limit=512)
SMALL = replace(LARGE, image_patch_limit=60)
rng = np.random.default_rng(7)


def both(files: Sequence[bytes], vision: VisionConfig) -> tuple[list[Decoded], list[Decoded]]:
    wanted = [
        MediaFile(data=data, media=plan_media(segment_of(data, "image", "png"), vision)) for data in files
    ]
    return DaliDecoder(vision).decode(wanted), ReferenceDecoder(vision).decode(wanted)


def levels(found: Decoded, expected: Decoded) -> torch.Tensor:
    assert found.patches is not None and expected.patches is not None
    return (found.patches.float() - expected.patches.float()).abs()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255)


def stripes(width: int, height: int) -> Image.Image:
    lines = (np.arange(width) // 3 % 2 * 255).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(lines, (height, width)).copy()).convert("RGB")


def smooth(width: int, height: int) -> Image.Image:
    coarse = rng.integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def test_images_within_the_limits_are_the_references_to_the_bit() -> None:
    pictures = [smooth(250, 200), noise(33, 31), make_picture(1, 1, 0), make_picture(29, 700, 1)]
    files = [
        image_bytes(picture, image_format, **options)
        for picture in pictures
        for image_format, options in (
            ("JPEG", {}),
            ("JPEG", {"progressive": True, "subsampling": 1}),
            ("PNG", {}),
            ("WEBP", {"quality": 70}),
            ("WEBP", {"lossless": True}),
        )
    ]
    grey, few = smooth(90, 70).convert("L"), smooth(90, 70).quantize(3)
    files += [image_bytes(grey, "JPEG"), image_bytes(grey, "PNG"), image_bytes(few, "PNG", bits=2)]
    files += [image_bytes(grey.convert("1"), "PNG"), image_bytes(smooth(60, 40), "JPEG", keep_rgb=True)]

    found, expected = both(files, LARGE)

    assert {each.by for each in found} == {"dali"}
    assert {each.by for each in expected} == {"pillow"}
    for one, other in zip(found, expected, strict=True):
        assert levels(one, other).max() == 0


@pytest.mark.parametrize("draw", [noise, stripes, smooth, lambda w, h: make_picture(w, h, 3)])
def test_resized_images_stay_within_the_stated_bound(draw: object) -> None:
    sizes = [(300, 200), (123, 457), (900, 110), (640, 480)]
    files = [image_bytes(draw(*size), "PNG") for size in sizes]  # type: ignore[operator]

    found, expected = both(files, SMALL)

    assert {each.by for each in found} == {"dali"}
    for one, other in zip(found, expected, strict=True):
        difference = levels(one, other)
        assert difference.max() <= (8 if draw is smooth else MAX_DIFFERENCE)
        assert difference.mean() <= (4 if draw is noise else MAX_MEAN_DIFFERENCE)


def test_what_dali_does_not_show_faithfully_is_the_references_and_says_why() -> None:
    picture = smooth(60, 40)
    clear = picture.copy()
    clear.putalpha(100)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.full((40, 60), 0x8000, np.uint16))
    palette = picture.quantize(8)
    cases = {
        "format or damage": [image_bytes(picture, name) for name in ("GIF", "TIFF", "AVIF", "BMP")],
        "transparency": [
            image_bytes(clear, "PNG"),
            image_bytes(palette, "PNG", transparency=0),
            image_bytes(picture.convert("L"), "PNG", transparency=7),
            image_bytes(clear.convert("LA"), "PNG"),
            image_bytes(clear, "WEBP"),
            image_bytes(clear, "WEBP", lossless=True),
        ],
        "colours: PNG I;16": [image_bytes(deep, "PNG")],
        "colours: JPEG CMYK": [image_bytes(picture.convert("CMYK"), "JPEG")],
        "animated": [image_bytes(picture, "PNG", save_all=True, append_images=[smooth(60, 40)])],
        "size, or turned": [
            image_bytes(picture, "JPEG", exif=exif),
            image_bytes(smooth(50, 50), "PNG", exif=exif),
            image_bytes(smooth(50, 50), "JPEG", exif=exif),
        ],
    }
    for reason, files in cases.items():
        found, expected = both(files, LARGE)
        assert [each.by for each in found] == [f"pillow: {reason}"] * len(files)
        for one, other in zip(found, expected, strict=True):
            assert one.patches is not None and other.patches is not None
            assert torch.equal(one.patches, other.patches)


def test_a_damaged_file_fails_as_with_the_reference_and_harms_no_other() -> None:
    data = [image_bytes(smooth(120, 90), name) for name in ("JPEG", "PNG", "WEBP")] * 2
    whole = [MediaFile(data=each, media=plan_media(segment_of(each, "image", "png"), LARGE)) for each in data]
    files = [replace(each, data=each.data[: len(each.data) // 2]) for each in whole[:3]]
    files += [replace(whole[3], data=b""), replace(whole[4], data=b"no image" * 9)]
    mixed = [each for pair in zip(files, whole[:5], strict=True) for each in pair]

    found, expected = DaliDecoder(LARGE).decode(mixed), ReferenceDecoder(LARGE).decode(mixed)

    for one, other in zip(found, expected, strict=True):
        assert one.failure.split(" at 0x")[0] == other.failure.split(" at 0x")[0]
        assert (one.patches is None) == (other.patches is None)
    assert sum(each.by == "dali" for each in found) == 5


def test_batches_are_bounded_in_images_and_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "BATCH_PIXELS", 100 * 100 * 3)
    sizes = [(100, 100)] * 4 + [(400, 400)] + [(4, 4)] * 20
    data = [image_bytes(make_picture(*size, seed), "PNG") for seed, size in enumerate(sizes)]
    runs: list[int] = []
    run = DaliImages._run
    monkeypatch.setattr(
        DaliImages,
        "_run",
        lambda self, batch, resizes: (runs.append(len(batch)), run(self, batch, resizes))[1],
    )

    found, expected = both(data, LARGE)

    assert runs == [3, 1, 1, 16, 4]
    for one, other in zip(found, expected, strict=True):
        assert levels(one, other).max() == 0


def test_a_pipeline_is_not_used_in_a_forked_process() -> None:
    data = image_bytes(smooth(60, 40), "JPEG")
    file = (data, plan_media(segment_of(data, "image", "png"), LARGE))
    images = DaliImages(LARGE)
    assert images.decode([file])[0] is not None
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            images.decode([file])
        except RuntimeError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader) as told:
        assert f"process {os.getpid()} was used in process {pid}, forked from it" in told.read()


def test_a_missing_dali_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "_PACKAGES", ("no-such-dali-cuda130",))
    with pytest.raises(ConfigError, match=r"needs NVIDIA DALI.*pip install.*data.decoder=pillow"):
        build_decoder(Decoder.dali, LARGE)


def test_versions_of_what_decodes_are_facts() -> None:
    assert decoder_versions(Decoder.dali).startswith("DALI 2.")
    assert "nvImageCodec" in decoder_versions(Decoder.dali)
    assert decoder_versions(Decoder.pillow).startswith("Pillow ")
    assert "DALI" not in decoder_versions(Decoder.pillow)


def test_videos_are_the_references() -> None:
    media = make_video(64, 48, "mp4", num_frames=8, fps=4, seed=6)
    file = MediaFile(data=media.data, media=plan_media(segment_of(media.data, "video", "mp4"), LARGE))

    (found,) = DaliDecoder(LARGE).decode([file])

    assert found.by == "pillow: video"
    assert found.patches is not None
