"""What `data.decoder` chooses: one interface from media files to patches.

Pillow and PyAV are the reference (`patches.py`). DALI (`dali.py`) does what it does faithfully and leaves the
rest to the reference, and says of each file which of the two it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol

from PIL import features
from torch import Tensor

from k25_train.config.data import Decoder
from k25_train.config.vision import VisionConfig
from k25_train.data.decode.dali import DALI, DaliImages, dali_versions
from k25_train.data.decode.items import PlannedMedia
from k25_train.data.decode.patches import load_patches
from k25_train.data.decode.routing import reason_for_reference
from k25_train.data.decode.view import AS_IT_IS, View
from k25_train.errors import DataError

REFERENCE = "pillow"
"""`Decoded.by` without DALI."""
_CODECS = ("libjpeg_turbo", "zlib", "webp", "avif")


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaFile:
    """A file, and what is wanted of it."""

    data: bytes
    """All of it."""
    media: PlannedMedia
    """Its sizes, and its items."""
    positions: Sequence[int] | None = None
    """Items that are wanted, ascending; None is all."""
    view: View = AS_IT_IS
    """How it is changed at random."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """What became of a file."""

    patches: Tensor | None
    """As `load_patches` gives them; None if it does not decode."""
    failure: str
    """Why it does not decode; empty if it does."""
    by: str
    """`dali`, `pillow`, or `pillow: REASON` for what DALI leaves to it."""


class MediaDecoder(Protocol):
    """Decodes files of any kind, several at once."""

    def decode(self, files: Sequence[MediaFile]) -> list[Decoded]:
        """Each file's patches, in order. A file that does not decode harms no other."""


class ReferenceDecoder:
    """Pillow and PyAV, one file after another."""

    def __init__(self, vision: VisionConfig) -> None:
        self._vision = vision

    def decode(self, files: Sequence[MediaFile]) -> list[Decoded]:
        """See `MediaDecoder`."""
        return [self.decode_one(file, REFERENCE) for file in files]

    def decode_one(self, file: MediaFile, by: str) -> Decoded:
        """One file, noted as decoded `by`."""
        try:
            return Decoded(
                load_patches(file.data, file.media, self._vision, file.positions, file.view), "", by
            )
        except DataError as error:
            return Decoded(None, str(error), by)


class DaliDecoder:
    """DALI for the images that it shows as the reference does, the reference for all others."""

    def __init__(self, vision: VisionConfig) -> None:
        """Raises `ConfigError` where DALI is not installed."""
        self._reference = ReferenceDecoder(vision)
        self._images = DaliImages(vision)

    def decode(self, files: Sequence[MediaFile]) -> list[Decoded]:
        """See `MediaDecoder`."""
        reasons = [reason_for_reference(file.data, file.media.segment, file.view) for file in files]
        own = [number for number, reason in enumerate(reasons) if not reason]
        patches = dict(
            zip(own, self._images.decode([(files[i].data, files[i].media) for i in own]), strict=True)
        )
        return [
            self._finish(file, reason, patches.get(number))
            for number, (file, reason) in enumerate(zip(files, reasons, strict=True))
        ]

    def _finish(self, file: MediaFile, reason: str, patches: Tensor | None) -> Decoded:
        if patches is not None:
            return Decoded(patches, "", DALI)
        # What DALI could not decode is most likely damaged: the reference says how.
        return self._reference.decode_one(file, f"{REFERENCE}: {reason or 'DALI refused it'}")


def build_decoder(decoder: Decoder, vision: VisionConfig) -> MediaDecoder:
    """The decoder of the configuration. Raises `ConfigError` for one that is not installed."""
    return DaliDecoder(vision) if decoder is Decoder.dali else ReferenceDecoder(vision)


def decoder_versions(decoder: Decoder) -> str:
    """Programs that decide pixels, with their versions, for the facts that a checkpoint keeps."""
    codecs = ", ".join(f"{name} {features.version(name)}" for name in _CODECS)
    reference = f"Pillow {version('pillow')} ({codecs}), PyAV {version('av')}"
    return f"{dali_versions()}; {reference}" if decoder is Decoder.dali else reference
