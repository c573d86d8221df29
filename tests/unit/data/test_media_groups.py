"""Small images are read by the group, everything else alone, and each result arrives in its place."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from k25_train.data.decode.items import plan_media
from k25_train.data.decode.media import MediaPatches
from k25_train.data.units import GROUP_IMAGES, GroupedReading, MediaGroup, MediaUnit, Read, Unit, grouped
from tests.helpers.media_files import image_bytes, segment_of
from tests.helpers.tiny_shards import make_picture, make_video, tiny_vision_config

VISION = tiny_vision_config()


def unit_of(data: bytes, media_type: str, file_format: str) -> MediaUnit:
    return MediaUnit("a", plan_media(segment_of(data, media_type, file_format), VISION), None)


SMALL = unit_of(image_bytes(make_picture(56, 28, 1), "PNG"), "image", "png")
VIDEO = unit_of(make_video(64, 48, "gif", 8, 4, seed=1).data, "video", "gif")


class Counting:
    """Gives numbered results, and notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[Unit] = []

    def read(self, units: Sequence[Unit]) -> Iterator[Read]:
        number = 0
        for unit in units:
            self.asked.append(unit)
            count = len(unit.units) if isinstance(unit, MediaGroup) else 1
            results = tuple(MediaPatches({}, str(number + i)) for i in range(count))
            number += count
            yield Read(results if count > 1 else results[0], {f"met in {number}": "why"})


def test_results_come_one_by_one_in_order() -> None:
    inner = Counting()
    units = [SMALL, SMALL, VIDEO, *[SMALL] * (GROUP_IMAGES + 1)]

    found = list(GroupedReading(inner, VISION).read(units))

    sizes = [len(unit.units) if isinstance(unit, MediaGroup) else 1 for unit in inner.asked]
    assert sizes == [2, 1, GROUP_IMAGES, 1]
    assert [each.result.failure for each in found if isinstance(each.result, MediaPatches)] == [
        str(number) for number in range(len(units))
    ]
    assert sum(len(each.skipped) for each in found) == len(inner.asked)


def test_large_images_stay_alone() -> None:
    vision = replace(VISION, image_patch_limit=16384, side_patch_limit=512)
    media = plan_media(segment_of(image_bytes(make_picture(1800, 1800, 1), "PNG"), "image", "png"), vision)
    large = MediaUnit("a", media, None)

    assert large.result_bytes(vision) > 2**23
    assert grouped([large] * 3, vision) == [large] * 3
