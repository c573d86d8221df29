"""Media files of a data set as patches; zeros, with the reason, for a file that does not decode."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from k25_train.config.model import VisionConfig
from k25_train.data.decode.items import PlannedMedia
from k25_train.data.decode.patches import load_patches
from k25_train.data.formats.reader import Files
from k25_train.data.formats.shard_reader import check_crc32
from k25_train.errors import DataError


@dataclass(frozen=True, slots=True)
class MediaPatches:
    """The patches of one image or video, or of some of its items."""

    items: Mapping[int, Tensor]
    """Position among the file's vision items, ascending -> [P, 3*p*p] float32."""
    failure: str | None
    """Why the file does not decode, in which case all patches are 0."""


class MediaReader:
    """Reads and decodes images and videos."""

    def __init__(self, reader: Files, vision: VisionConfig) -> None:
        self._reader = reader
        self._vision = vision

    def load(self, media: PlannedMedia, positions: Collection[int] | None = None) -> MediaPatches:
        """The patches of an image or video; with `positions`, only of these items.

        Whether it fails, and why, does not depend on the positions.
        """
        segment, items = media.segment, media.items
        data = self._reader.read(segment.shard, segment.offset, segment.num_bytes)
        chosen = range(len(items)) if positions is None else sorted(positions)
        sizes = [items[position].num_patches for position in chosen]
        failure = None
        try:
            check_crc32(data, segment.crc32)
            patches = load_patches(data, media, self._vision, chosen)
        except DataError as error:
            patches = torch.zeros(sum(sizes), 3 * self._vision.patch_size**2)
            place = f"its {segment.type} (.{segment.format} at byte {segment.offset} of {segment.shard})"
            failure = f"{place} {error}"
        return MediaPatches(dict(zip(chosen, patches.split(sizes), strict=True)), failure)
