"""Texts as they are true of a cropped or mirrored picture."""

import math
import re
from collections.abc import Sequence
from itertools import chain

from k25_train.data.decode.view import View
from k25_train.data.formats.declared import NUMBER, Region, swapped
from k25_train.data.formats.records import MediaSegment
from k25_train.data.formats.sample_json import SampleError, Words


def corners(words: Sequence[Words], media: Sequence[MediaSegment]) -> list[list[tuple[float, float]]]:
    """Points, and corners of boxes, of each image and video, in shares of width and height.

    Raises SampleError, with the reason alone, for a region outside of its picture.
    """
    found: list[list[tuple[float, float]]] = [[] for _ in media]
    for each in words:
        for region in each.declared.regions:
            if region.media >= len(media):
                raise SampleError(f"a region is of its media {region.media}, it has {len(media)}")
            places = _places(region, each.text, media[region.media])
            if max(chain.from_iterable(places)) > 1:
                raise SampleError(f"{each.text[region.start : region.stop]!r} is outside of its picture")
            found[region.media] += places
    return found


def rewritten(words: Words, views: Sequence[View], media: Sequence[MediaSegment]) -> str:
    """A text with the coordinates, and the words of orientation, of changed pictures."""
    edits = []
    for region in words.declared.regions:
        view, segment = views[region.media], media[region.media]
        if view.moves:
            edits.append((region.start, region.stop, _moved(region, words.text, view, segment)))
    # All pictures of a sample are mirrored, or none is.
    if any(view.flip for view in views):
        for start, stop in words.declared.orientation:
            edits += _without(words, start, stop)
    text = words.text
    for start, stop, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[stop:]
    return text


def _without(words: Words, start: int, stop: int) -> list[tuple[int, int, str]]:
    """The span mirrored, but for regions within it, which are rewritten by themselves."""
    edits = []
    for region in words.declared.regions:
        if start < region.stop and region.start < stop:
            edits.append((start, max(start, region.start), swapped(words.text[start : region.start])))
            start = max(start, region.stop)
    return [*edits, (start, max(start, stop), swapped(words.text[start:stop]))]


def _places(region: Region, text: str, segment: MediaSegment) -> list[tuple[float, float]]:
    values = [float(value) for value in NUMBER.findall(text, region.start, region.stop)]
    width, height = _ends(region, segment)
    return [(x / width, y / height) for x, y in zip(values[::2], values[1::2], strict=True)]


def _ends(region: Region, segment: MediaSegment) -> tuple[float, float]:
    return (1000, 1000) if region.format == "normalized_1000" else (segment.width, segment.height)


def _moved(region: Region, text: str, view: View, segment: MediaSegment) -> str:
    # 1. Its corners in the view; a mirror swaps left and right.
    places = [view.point(x, y) for x, y in _places(region, text, segment)]
    if region.kind == "box" and view.flip:
        (left, top), (right, bottom) = places
        places = [(right, top), (left, bottom)]
    width, height = _ends(region, segment)
    values = iter([scaled for x, y in places for scaled in (x * width, y * height)])

    # 2. Written as they were: as many decimals, and zeros in front where there were some.
    span = text[region.start : region.stop]
    written = NUMBER.findall(span)
    is_padded = any(len(number.partition(".")[0]) > 1 and number[0] == "0" for number in written)
    num_characters = max(map(len, written)) if is_padded else 0

    def new(match: re.Match[str]) -> str:
        decimals = len(match[0].partition(".")[2])
        rounded = math.floor(next(values) * 10**decimals + 0.5) / 10**decimals
        return f"{max(0.0, rounded):.{decimals}f}".zfill(num_characters)

    return NUMBER.sub(new, span)
