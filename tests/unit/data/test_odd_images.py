"""Images of any size, mode and format as Kimi's processor in transformers sees them: equal grids."""

import io
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.kimi_k25.image_processing_kimi_k25 import Kimi_K25ImageProcessor

from k25_train.config.data import Decoder
from k25_train.data.decode.decoder import MediaFile, build_decoder
from k25_train.data.decode.frames import probe_media
from k25_train.data.decode.items import plan_media, resized_size
from k25_train.model.moonvit_positions import normalised
from tests.helpers.media_files import image_bytes, segment_of
from tests.helpers.tiny_shards import tiny_vision_config

CHECKPOINT = replace(tiny_vision_config(), image_patch_limit=16384, side_patch_limit=512)
MAX_DIFFERENCE, MAX_MEAN_DIFFERENCE = 40, 1.5
"""Levels of 255 between resized pixels: Pillow's bicubic filter, which the release uses, and torchvision's,
which transformers uses, round in other places. Images that are not resized are equal."""
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF", "BMP")
_MODES = ("RGB", "L", "P", "1")


def odd_image(number: int) -> tuple[bytes, int]:
    """A file, and the patch limit that it is read with: one in four is scaled down."""
    rng = random.Random(number)
    short, long = rng.choice([(1, 1), (1, 30), (2, 900), (13, 15), (28, 28), (27, 29), (60, 200), (150, 170)])
    width, height = rng.sample([short + rng.randint(0, 3), long + rng.randint(0, 9)], 2)
    coarse = np.random.default_rng(number).integers(
        0, 256, (-(-height // 6), -(-width // 6), 3), dtype=np.uint8
    )
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    name, mode = _FORMATS[number % len(_FORMATS)], _MODES[number % len(_MODES)]
    lossy = name in ("JPEG", "WEBP", "AVIF")
    picture = picture.convert("L" if lossy and mode in ("1", "P") else mode)
    return image_bytes(picture, name), 16384 if number % 4 else 60


def compare(numbers: range) -> None:
    for number in numbers:
        data, limit = odd_image(number)
        vision = replace(CHECKPOINT, image_patch_limit=limit)
        segment = segment_of(data, "image", "x")
        media = plan_media(segment, vision)
        with Image.open(io.BytesIO(data)) as opened:
            expected = Kimi_K25ImageProcessor(max_patches=limit)(opened.convert("RGB"), return_tensors="pt")
        assert [list(media.items[0].grid_thw)] == expected["image_grid_thw"].tolist(), number
        for decoder in (Decoder.pillow, Decoder.dali):
            (found,) = build_decoder(decoder, vision).decode([MediaFile(data=data, media=media)])
            assert found.patches is not None, found.failure
            difference = (normalised(found.patches) - expected["pixel_values"].reshape(-1, 588)).abs() * 127.5
            sizes = segment.width, segment.height
            is_resized = resized_size(*sizes, limit, vision) != sizes
            assert difference.max() <= (MAX_DIFFERENCE if is_resized else 1e-4), (number, found.by)
            assert difference.mean() <= MAX_MEAN_DIFFERENCE, (number, found.by)


def test_some_odd_images_are_those_of_the_processor() -> None:
    compare(range(28))


@pytest.mark.slow
def test_five_hundred_odd_images_are_those_of_the_processor() -> None:
    compare(range(500))


@pytest.mark.parametrize(
    "options",
    [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_deflate"}, {"save_all": True}],
    ids=["raw", "lzw", "deflate", "pages"],
)
def test_tiff_in_its_variants_shows_its_first_page(options: dict[str, object]) -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    pages = {"append_images": [Image.new("RGB", (40, 30))]} if options.get("save_all") else {}
    data = image_bytes(picture, "TIFF", **options, **pages)

    media = plan_media(segment_of(data, "image", "tif"), CHECKPOINT)
    (found,) = build_decoder(Decoder.pillow, CHECKPOINT).decode([MediaFile(data=data, media=media)])

    expected = Kimi_K25ImageProcessor()(picture, return_tensors="pt")["pixel_values"].reshape(-1, 588)
    assert found.patches is not None
    torch.testing.assert_close(normalised(found.patches), expected, rtol=0, atol=1e-6)


def test_deep_and_cmyk_tiff_are_read_and_floats_are_refused_by_name() -> None:
    deep = Image.fromarray(np.full((30, 40), 0x8000, np.uint16))
    for picture in (deep, Image.new("CMYK", (40, 30), (0, 0, 0, 100))):
        info = probe_media(image_bytes(picture, "TIFF"), "image", "tif")
        assert (info.width, info.height) == (40, 30)
    with pytest.raises(Exception, match="32-bit samples"):
        probe_media(image_bytes(Image.fromarray(np.ones((30, 40), np.float32)), "TIFF"), "image", "tif")


def test_avif_is_read_still_and_animated() -> None:
    frames = [Image.new("RGB", (40, 30), (60 * number, 10, 200)) for number in range(4)]
    still = image_bytes(frames[1], "AVIF")
    moving = image_bytes(frames[0], "AVIF", save_all=True, append_images=frames[1:], duration=250)

    assert (probe_media(still, "image", "avif").width, probe_media(moving, "image", "avif").width) == (40, 40)
    video = probe_media(moving, "video", "avif")
    assert (video.num_frames, video.duration_s) == (4, 1.0)
