"""Sizes of many documents at once are those of one after the other, whatever an index may hold."""

from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.compose.resolve import compose
from k25_train.config.vision import VisionConfig
from k25_train.data.decode.grids import grids_of
from k25_train.data.decode.items import fits_aspect, grid_of
from k25_train.data.formats.frame_times import FrameTimes
from k25_train.data.formats.records import MediaSegment, SampleRecord, Segment, TextSegment
from k25_train.data.mix.columns import ItemColumns
from k25_train.data.mix.documents import DocumentBuilder, find_defect
from k25_train.data.mix.lengths import DocumentLengths
from tests.helpers.synthetic_index import SyntheticTokenizer
from tests.helpers.tiny_shards import tiny_vision_config

FRAME_TOKENS = 2
RELEASED = compose(["experiment=k25_pretrain_4k"]).model.vision
LIMITS = (RELEASED, tiny_vision_config())
SIDES = st.one_of(
    st.integers(1, 60), st.integers(1, 5000), st.sampled_from([14, 28, 7168, 20_000, 2**31 - 1])
)


@st.composite
def media(draw: st.DrawFn) -> MediaSegment:
    """An image or a video, an empty file at times."""
    is_video = draw(st.booleans())
    times = FrameTimes(
        Fraction(1, draw(st.sampled_from([1, 24, 30, 1000]))),
        tuple(draw(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40)), min_size=1, max_size=3))),
    )
    return MediaSegment(
        type="video" if is_video else "image",
        shard="s.tar",
        offset=0,
        num_bytes=draw(st.sampled_from([0, 1, 1000, 1000])),
        format="mp4" if is_video else "png",
        width=draw(SIDES),
        height=draw(SIDES),
        num_frames=times.num_frames if is_video else 1,
        duration_s=times.duration_s if is_video else 0.0,
        frame_times=str(times) if is_video else "",
    )


@st.composite
def records(draw: st.DrawFn) -> SampleRecord:
    texts = st.builds(TextSegment, num_tokens=st.integers(0, 300), loss=st.booleans())
    segments: list[Segment] = draw(st.lists(st.one_of(texts, media()), min_size=1, max_size=5))
    kind = "caption" if any(isinstance(each, MediaSegment) for each in segments) else "text"
    return SampleRecord(
        shard="s.tar", key="0", kind=kind, source="s", offset=0, num_bytes=9, segments=tuple(segments)
    )


@pytest.mark.parametrize("vision", LIMITS, ids=["released", "tiny"])
@settings(max_examples=150)
@given(sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=20))
def test_grids_are_those_of_one_image(vision: VisionConfig, sizes: list[tuple[int, int]]) -> None:
    widths, heights = (np.array(side, dtype=np.uint32) for side in zip(*sizes, strict=True))
    for limit, kind in ((vision.image_patch_limit, "image"), (vision.frame_patch_limit, "video")):
        found = grids_of(widths, heights, limit, vision)
        expected = [grid_of(width, height, limit, vision) for width, height in sizes]
        assert list(zip(found.rows.tolist(), found.columns.tolist(), strict=True)) == expected
        aspects = [mock.Mock(type=kind, width=width, height=height) for width, height in sizes]
        assert found.fits_aspect.tolist() == [fits_aspect(each, vision) for each in aspects]


@pytest.mark.parametrize("vision", LIMITS, ids=["released", "tiny"])
@settings(max_examples=80, deadline=None)
@given(samples=st.lists(records(), min_size=1, max_size=6))
def test_documents_are_measured_as_one_is(vision: VisionConfig, samples: list[SampleRecord]) -> None:
    documents = DocumentBuilder(mock.Mock(), SyntheticTokenizer(), vision)  # type: ignore[arg-type]
    lengths = DocumentLengths(
        ItemColumns.of(samples),
        samples.__getitem__,
        vision,
        documents.num_item_tokens,
        num_frame_tokens=FRAME_TOKENS,
    )
    # In any order, and more than once, as a window draws them.
    items = np.array([*range(len(samples)), 0, *reversed(range(len(samples)))])
    found = lengths.measure(items)
    for position, item in enumerate(items.tolist()):
        record = samples[item]
        defect = find_defect(record, vision)
        assert found.lengths[position] == (0 if defect else documents.num_tokens(record)), defect
        if defect is None:
            first, last = found.vision_offsets[position : position + 2]
            planned = [each.grid_thw for one in documents.media(record) for each in one.items]
            assert [tuple(grid) for grid in found.grids[first:last].tolist()] == [tuple(g) for g in planned]
