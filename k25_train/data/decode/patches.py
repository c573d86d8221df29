"""From media files to patches, at native resolution as K2.5's preprocessing does it."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from k25_train.config.vision import VisionConfig
from k25_train.data.decode.clock import Shown, frame_times
from k25_train.data.decode.frames import DecoderErrors, decode_frames
from k25_train.data.decode.items import PlannedMedia, patch_limit_of, resized_size
from k25_train.data.decode.view import AS_IT_IS, View
from k25_train.data.formats.records import MediaSegment
from k25_train.errors import DataError


def load_patches(
    data: bytes,
    media: PlannedMedia,
    vision: VisionConfig,
    positions: Sequence[int] | None = None,
    view: View = AS_IT_IS,
) -> Tensor:
    """Decode a media file into the patches of its items, one after another.

    `positions`, in ascending order, select items; None selects all. `view` says how pictures are changed at
    random.

    Returns [P, 3*p*p] uint8 (p = patch size) in rows ordered (t, h, w), each patch channel-first; padding is
    black. The tower normalises them, on the device: a fourth of the bytes passes through memory and over the
    bus. Raises DataError with the reason if the file does not decode or is not of the size that the index
    says, the same whatever the positions.
    """
    segment = media.segment
    size = resized_size(segment.width, segment.height, patch_limit_of(segment, vision), vision)
    chosen = media.items if positions is None else [media.items[position] for position in positions]
    _, rows, columns = media.items[0].grid_thw
    uses = Counter(frame for item in chosen for frame in item.frames)
    patches: list[Tensor] = []
    pixel_formats: set[str] = set()
    shown: list[Shown] = []
    # Every frame is decoded, whichever are wanted: a file that breaks after them, or has another number of
    # frames than the index says, has to fail on every rank that holds a part of it, as it does in one process
    # that holds all. Converting a frame is costly, too, and done only for those that are wanted; only a
    # pixel format without a way to RGB can make that fail, so each format is converted once.
    with DecoderErrors():
        for frame in decode_frames(data, segment.type, segment.format, legacy=segment.format_version == 1):
            if frame.size != (segment.width, segment.height):
                raise DataError(
                    f"decodes to {frame.size[0]}x{frame.size[1]} pixels, the index says "
                    f"{segment.width}x{segment.height}"
                )
            num_uses = uses[len(shown)]
            if num_uses or frame.pixel_format not in pixel_formats:
                image = frame.to_rgb()
                pixel_formats.add(frame.pixel_format)
            if num_uses:
                frame_patches = patchify(np.asarray(view.of(image, size)), (rows, columns), vision.patch_size)
                patches += [frame_patches] * num_uses
            shown.append(frame.shown)
    _check_frames(segment, shown)
    # A copy of an image's patches would cost as much as making them.
    return patches[0] if len(patches) == 1 else torch.cat(patches)


def _check_frames(segment: MediaSegment, shown: Sequence[Shown]) -> None:
    if len(shown) != segment.num_frames:
        raise DataError(f"decodes to {len(shown)} frame(s), the index says {segment.num_frames}")
    if segment.frame_times and str(frame_times(shown)) != segment.frame_times:
        raise DataError("shows its frames at other times than the index says")


def patchify(frame: np.ndarray, grid: Sequence[int], patch: int) -> Tensor:
    """[H, W, 3] uint8 -> [h*w, 3*p*p] uint8: padded with black, cut into channel-first patches."""
    rows, columns = grid
    height, width, _ = frame.shape
    # Row by row, channels one after another: what is moved next is a patch's line at once, not byte by byte.
    planar = np.zeros((rows * patch, 3, columns * patch), dtype=np.uint8)
    planar[:height, :, :width] = frame.transpose(0, 2, 1)
    lines = planar.view(f"V{patch}").reshape(rows, patch, 3, columns).transpose(0, 3, 2, 1)
    patches = np.ascontiguousarray(lines).view(np.uint8)
    return torch.from_numpy(patches).view(rows * columns, 3 * patch * patch)
