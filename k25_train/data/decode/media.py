"""Media files of a data set as patches; black ones, with the reason, for a file that does not decode."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from k25_train.config.data import Decoder
from k25_train.config.vision import VisionConfig
from k25_train.data.decode.decoder import REFERENCE, MediaFile, build_decoder
from k25_train.data.decode.items import Drawn, PlannedMedia
from k25_train.data.decode.view import AS_IT_IS, View
from k25_train.data.formats.reader import Files
from k25_train.data.formats.shard_reader import check_crc32
from k25_train.data.storage.counts import COUNTS, PIXELS
from k25_train.errors import DataError


@dataclass(frozen=True, slots=True)
class MediaPatches:
    """The patches of one image or video, or of some of its items."""

    items: Mapping[int, Tensor]
    """Position among the file's vision items, ascending -> [P, 3*p*p] uint8."""
    failure: str | None
    """Why the file does not decode, in which case all patches are 0, black."""
    by: str = REFERENCE
    """What decoded it (`Decoded.by`)."""


class Wanted(NamedTuple):
    """An image or video, and which of its items are wanted."""

    media: PlannedMedia
    positions: Collection[int] | None = None
    """None is all of them."""


class MediaReader:
    """Reads and decodes images and videos."""

    def __init__(
        self,
        reader: Files,
        vision: VisionConfig,
        decoder: Decoder = Decoder.pillow,
        view: Callable[[Drawn], View] = lambda drawn: AS_IT_IS,
    ) -> None:
        """`view`: how an image or video is changed.

        Raises `ConfigError` for a decoder that is not installed.
        """
        self._view = view
        self._reader = reader
        self._vision = vision
        self._decoder = build_decoder(decoder, vision)
        self.num_by = Counter[str]()
        """What decoded so far (`Decoded.by`) -> number of files."""

    def load(self, media: PlannedMedia, positions: Collection[int] | None = None) -> MediaPatches:
        """The patches of an image or video; with `positions`, only of these items.

        Whether it fails, and why, does not depend on the positions.
        """
        return self.load_all([Wanted(media, positions)])[0]

    def load_all(self, wanted: Sequence[Wanted]) -> list[MediaPatches]:
        """What `load` gives of each of several, decoded together, which DALI does in less time."""
        files: list[MediaFile] = []
        failures: dict[int, str] = {}
        for number, (media, positions) in enumerate(wanted):
            segment = media.segment
            data = self._reader.read(segment.shard, segment.offset, segment.num_bytes)
            chosen = range(len(media.items)) if positions is None else sorted(positions)
            files.append(MediaFile(data=data, media=media, positions=chosen, view=self._view(media.drawn)))
            try:
                check_crc32(data, segment.crc32)
            except DataError as error:
                failures[number] = str(error)
        sound = [number for number in range(len(files)) if number not in failures]
        decoded = dict(zip(sound, self._decoder.decode([files[number] for number in sound]), strict=True))
        self.num_by.update(each.by for each in decoded.values())
        return [
            self._finish(file, decoded[number].patches, decoded[number].failure, decoded[number].by)
            if number in decoded
            else self._finish(file, None, failures[number], REFERENCE)
            for number, file in enumerate(files)
        ]

    def _finish(self, file: MediaFile, patches: Tensor | None, failure: str, by: str) -> MediaPatches:
        segment, positions = file.media.segment, file.positions or ()
        sizes = [file.media.items[position].num_patches for position in positions]
        reason = None
        if patches is None:
            patches = torch.zeros(sum(sizes), 3 * self._vision.patch_size**2, dtype=torch.uint8)
            place = f"its {segment.type} (.{segment.format} at byte {segment.offset} of {segment.shard})"
            reason = f"{place} {failure}"
        else:
            COUNTS.add(PIXELS, patches.numel() // 3)
        return MediaPatches(dict(zip(positions, patches.split(sizes), strict=True)), reason, by)
