"""What a trainer knows of the model that an engine serves, to tell a right answer from a wrong one."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from k25_train.config.vision import VisionConfig
from k25_train.data.decode.items import plan_media
from k25_train.data.formats.records import MediaSegment
from k25_train.rollout.engines.images import expand_placeholders, image_segment

CACHED_IMAGES = 4096
"""Whose sizes are remembered: the responses of a group share them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """Vocabulary and image sizes of the model."""

    vocab_size: int
    """Ids that there are."""
    media_pad: int
    """The placeholder of an image."""
    vision: VisionConfig
    """Limits by which images are resized: the number of their placeholders follows from them."""

    def expanded(self, token_ids: Sequence[int], images: Sequence[bytes]) -> np.ndarray:
        """[P] int32: the ids with (h/2)(w/2) placeholders in place of each one.

        Raises `DataError` if there are not as many placeholders as images, or an image is none.
        """
        segments = [_segment(image) for image in images]
        counts = [plan_media(segment, self.vision).items[0].num_tokens for segment in segments]
        return np.asarray(expand_placeholders(token_ids, counts, self.media_pad), dtype=np.int32)


@lru_cache(maxsize=CACHED_IMAGES)
def _segment(image: bytes) -> MediaSegment:
    return image_segment(image)
