"""Media files of the shards as patches; a file that does not decode is counted and stands as zeros."""

import torch
from torch import Tensor

from k25_train.config.schema import VisionConfig
from k25_train.data.images import load_patches, plan_items
from k25_train.data.index import MediaSegment, SampleRecord
from k25_train.data.shards import ShardReader
from k25_train.data.skips import SkipLog
from k25_train.errors import DataError


class MediaPatches:
    """The patches of one image or video."""

    __slots__ = ("is_decoded", "patches")

    def __init__(self, patches: Tensor, *, is_decoded: bool) -> None:
        self.patches = patches
        """[P, 3*p*p] float32, item after item."""
        self.is_decoded = is_decoded
        """Whether they are the file's; zeros if not."""


class MediaReader:
    """Reads and decodes images and videos."""

    def __init__(self, reader: ShardReader, vision: VisionConfig, skip_log: SkipLog) -> None:
        """`skip_log` is told of samples whose media do not decode, and may stop the run."""
        self._reader = reader
        self._vision = vision
        self._skip_log = skip_log

    def load(self, record: SampleRecord, segment: MediaSegment) -> MediaPatches:
        """The patches of a sample's image or video. Raises DataError if too many do not decode."""
        data = self._reader.read(segment.shard, segment.offset, segment.num_bytes)
        try:
            return MediaPatches(load_patches(data, segment, self._vision), is_decoded=True)
        except DataError as error:
            what = f"its {segment.type} (.{segment.format} at byte {segment.offset} of {segment.shard})"
            self._skip_log.add(record, f"{what} {error}")
            num_patches = sum(item.num_patches for item in plan_items(segment, self._vision))
            return MediaPatches(torch.zeros(num_patches, 3 * self._vision.patch_size**2), is_decoded=False)
