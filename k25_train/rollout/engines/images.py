"""Images of a prompt, as the trainer sees them: the same decoding, the same patches, the same placeholders.

An engine gets a prompt with one placeholder for each image, and the encoded images. What is trained has
(h/2)(w/2) placeholders for an image of h × w patches.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from k25_train.config.vision import VisionConfig
from k25_train.data.decode.file_types import media_info, sniff
from k25_train.data.decode.items import fits_aspect, plan_media
from k25_train.data.decode.patches import load_patches
from k25_train.data.formats.records import MediaSegment
from k25_train.errors import DataError
from parallel.dep.grid import Grid


class ImagePatches(NamedTuple):
    """What the vision tower takes of an image."""

    patches: Tensor
    """[h·w, 3·p·p] uint8, channel-first."""
    grid: Grid
    """1, h, w in patches."""


def image_segment(data: bytes) -> MediaSegment:
    """What an index would say of an encoded image. Raises `DataError` with the reason if it is none."""
    kind, file_format = sniff(data, "")
    if kind != "image":
        raise DataError(f"is a {kind} ({file_format}), not an image")
    info = media_info(data, kind, file_format)
    return MediaSegment(
        type=kind,
        shard="",
        offset=0,
        num_bytes=len(data),
        format=file_format,
        width=info.width,
        height=info.height,
        num_frames=1,
        duration_s=0.0,
        frame_times="",
    )


def num_image_tokens(data: bytes, vision: VisionConfig) -> int:
    """Vision tokens of an encoded image, which is not decoded. Raises `DataError` if it is none."""
    return plan_media(image_segment(data), vision).items[0].num_tokens


def load_image(data: bytes, vision: VisionConfig) -> ImagePatches:
    """Decode an image as training does. Raises `DataError` with the reason if it does not decode."""
    segment = image_segment(data)
    if not fits_aspect(segment, vision):
        raise DataError(
            f"is {segment.width}x{segment.height}: nothing is left of its short side once it fits"
        )
    media = plan_media(segment, vision)
    return ImagePatches(load_patches(data, media, vision), media.items[0].grid_thw)


def expand_placeholders(ids: Sequence[int], num_tokens: Sequence[int], media_pad: int) -> list[int]:
    """The ids with each placeholder as often as its image has tokens, in order.

    Raises `DataError` if there are not as many placeholders as images.
    """
    ids = list(ids)
    found = ids.count(media_pad)
    if found != len(num_tokens):
        raise DataError(f"has {found} placeholder(s) for {len(num_tokens)} image(s); one stands for each")
    # Conversations have tens of thousands of ids and few images: what lies between is copied whole.
    expanded: list[int] = []
    start = 0
    for count in num_tokens:
        stop = ids.index(media_pad, start)
        expanded += [*ids[start:stop], *[media_pad] * count]
        start = stop + 1
    return expanded + ids[start:]
