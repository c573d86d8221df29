"""What a trainer knows of the model that an engine serves, to tell a right answer from a wrong one."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from k25_train.config.vision import VisionConfig
from k25_train.data.decode.frames import probe_media
from k25_train.data.decode.items import grid_of

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

        Raises ValueError if there are not as many placeholders as images, `DataError` for an image that does
        not decode.
        """
        ids = np.asarray(token_ids, dtype=np.int32)
        pads = ids == self.media_pad
        if int(pads.sum()) != len(images):
            raise ValueError(
                f"{int(pads.sum())} placeholders for {len(images)} images; a prompt has one for each"
            )
        counts = np.ones(len(ids), dtype=np.int64)
        counts[pads] = [_num_tokens(image, self.vision) for image in images]
        return np.repeat(ids, counts)


def _num_tokens(image: bytes, vision: VisionConfig) -> int:
    rows, columns = grid_of(*_size(image), vision.image_patch_limit, vision)
    return rows * columns // vision.merge_size**2


@lru_cache(maxsize=CACHED_IMAGES)
def _size(image: bytes) -> tuple[int, int]:
    # Pillow tells formats by their content.
    found = probe_media(image, "image", "")
    return found.width, found.height
