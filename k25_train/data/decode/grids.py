"""Patch grids of many images at once: the rules of `items.py` on arrays, equal to them number by number."""

from typing import NamedTuple

import numpy as np

from k25_train.config.vision import VisionConfig


class ImageGrids(NamedTuple):
    """Of n images or video frames."""

    rows: np.ndarray
    """[n] int64: rows of patches, padding included."""
    columns: np.ndarray
    """[n] int64: columns of patches."""
    fits_aspect: np.ndarray
    """[n] bool: whether the short side keeps at least one pixel (`items.fits_aspect`)."""

    @property
    def num_tokens(self) -> np.ndarray:
        """[n] int64: tokens of the language model, 2x2 patches merged."""
        return (self.rows // 2) * (self.columns // 2)


def grids_of(width: np.ndarray, height: np.ndarray, patch_limit: int, vision: VisionConfig) -> ImageGrids:
    """Grids after resizing and padding (`items.grid_of`) of images of `width` x `height` [n] pixels."""
    # 1. Scale to the limits. The same operations on float64 as those of one image, in the same order.
    width, height = width.astype(np.int64), height.astype(np.int64)
    patch = vision.patch_size
    side_pixels = vision.side_patch_limit * patch
    num_patches = np.maximum(1, width // patch) * np.maximum(1, height // patch)
    scale = np.minimum(1.0, np.sqrt(patch_limit / num_patches))
    scale = np.minimum(scale, np.minimum(side_pixels / width, side_pixels / height))

    # 2. Cut to integers, then padded to whole merged tokens.
    factor = patch * vision.merge_size
    sides = [
        -(-np.clip((side * scale).astype(np.int64), 1, side_pixels) // factor) * vision.merge_size
        for side in (height, width)
    ]
    return ImageGrids(sides[0], sides[1], np.minimum(width, height) * scale >= 1)
