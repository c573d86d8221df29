"""How long the documents of a window are and what the vision tower sees of them, from columns of the index.

The same numbers as `documents.DocumentBuilder` and `documents.find_defect` give one by one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from k25_train.config.vision import VisionConfig
from k25_train.data.decode.grids import grids_of
from k25_train.data.decode.items import MediaItem, plan_items
from k25_train.data.formats.records import MEDIA_TYPES, SampleRecord
from k25_train.data.mix.columns import ItemColumns
from k25_train.data.mix.ragged import offsets_of, positions_of, sums_of
from parallel.dep.grid import Grid

VIDEO = MEDIA_TYPES.index("video")
CACHED_VIDEOS = 2**14
"""Videos whose items are kept, those of a window. Our choice."""


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Documents of n items."""

    lengths: np.ndarray
    """[n] int64: tokens; 0 of what cannot be used."""
    vision_offsets: np.ndarray
    """[n + 1] int64: where the vision items of each document begin in `grids`."""
    grids: np.ndarray
    """[I, 3] int32: frames, rows and columns of patches of each vision item."""


class DocumentLengths:
    """Measures the documents of one source."""

    def __init__(
        self,
        columns: ItemColumns,
        record: Callable[[int], SampleRecord],
        vision: VisionConfig,
        item_tokens: Callable[[MediaItem], int],
        *,
        num_frame_tokens: int,
    ) -> None:
        """
        Args:
            record: item -> its record, for videos.
            item_tokens: tokens of a vision item with those around its placeholders.
            num_frame_tokens: tokens around a whole document.
        """
        self._columns = columns
        self._record = record
        self._vision = vision
        self._item_tokens = item_tokens
        self._num_frame_tokens = num_frame_tokens
        one_token = MediaItem(grid_thw=Grid(1, 2, 2), frames=(0,), timestamp_s=None)
        self._tokens_around_image = item_tokens(one_token) - 1
        self._video = lru_cache(maxsize=CACHED_VIDEOS)(self._plan_video)

    def measure(self, items: np.ndarray) -> Measured:
        """The documents of items [n] int64."""
        columns = self._columns
        lengths = columns.text_tokens[items].astype(np.int64)
        is_unusable = (
            np.zeros(len(items), dtype=np.bool_) if columns.misfits is None else columns.misfits[items]
        )
        if not columns.has_media:
            is_unusable = is_unusable | (lengths == 0)
            nothing = np.zeros(len(items) + 1, dtype=np.int64)
            no_grids = np.zeros((0, 3), dtype=np.int32)
            return Measured(np.where(is_unusable, 0, lengths + self._num_frame_tokens), nothing, no_grids)

        # 1. Media of each item: where they are in the columns, and whose they are.
        assert columns.first_media is not None
        firsts = columns.first_media[items].astype(np.int64)
        num_media = columns.first_media[items + 1].astype(np.int64) - firsts
        media = positions_of(firsts, num_media)
        media_offsets = offsets_of(num_media)
        is_unusable = is_unusable | ((num_media == 0) & (lengths == 0))

        # 2. Images have one item each; what is wrong with any of them is wrong with the document.
        width, height = columns.media_width[media], columns.media_height[media]
        is_video = columns.media_type[media] == VIDEO
        grids = grids_of(width, height, self._vision.image_patch_limit, self._vision)
        of_frames = grids_of(width, height, self._vision.frame_patch_limit, self._vision)
        fits = np.where(is_video, of_frames.fits_aspect, grids.fits_aspect)
        is_bad = ~fits | (columns.media_bytes[media] == 0)
        is_unusable = is_unusable | (sums_of(is_bad, media_offsets) > 0)
        num_items = np.ones(len(media), dtype=np.int64)
        num_tokens = self._tokens_around_image + grids.num_tokens
        flat = np.stack([np.ones_like(grids.rows), grids.rows, grids.columns], axis=1).astype(np.int32)

        # 3. Videos by the scalar rules, as their frames have times of their own.
        if is_video.any():
            flat, num_items, num_tokens = self._with_videos(
                items, media_offsets, is_video & ~is_bad, (flat, num_items, num_tokens)
            )
        lengths = lengths + self._num_frame_tokens + sums_of(num_tokens, media_offsets)
        vision_offsets = offsets_of(sums_of(num_items, media_offsets))
        return Measured(np.where(is_unusable, 0, lengths), vision_offsets, flat)

    def _with_videos(
        self,
        items: np.ndarray,
        media_offsets: np.ndarray,
        is_video: np.ndarray,
        of_images: tuple[np.ndarray, np.ndarray, np.ndarray],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Grids, and per medium numbers of items and tokens, with those of videos in their places."""
        flat, num_items, num_tokens = of_images
        owners = np.searchsorted(media_offsets, np.flatnonzero(is_video), side="right") - 1
        grids: list[np.ndarray] = []
        done = 0
        for position, owner in zip(np.flatnonzero(is_video).tolist(), owners.tolist(), strict=True):
            video, tokens = self._video(int(items[owner]), position - int(media_offsets[owner]))
            grids += [flat[done:position], video]
            num_items[position], num_tokens[position] = len(video), tokens
            done = position + 1
        return np.concatenate([*grids, flat[done:]]), num_items, num_tokens

    def _plan_video(self, item: int, position: int) -> tuple[np.ndarray, int]:
        planned = plan_items(self._record(item).media[position], self._vision)
        grids = np.array([each.grid_thw for each in planned], dtype=np.int32).reshape(-1, 3)
        return grids, sum(map(self._item_tokens, planned))
