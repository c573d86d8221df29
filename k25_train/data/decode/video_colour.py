"""Decoded video frames as eight-bit sRGB."""

import av
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from k25_train.data.decode.screen import show_on_screen

_UNSPECIFIED = 2
"""Of a frame's colour tags (ITU-T H.273)."""
_HD_WIDTH, _HD_HEIGHT = 1280, 720


def to_rgb(frame: av.VideoFrame, *, legacy: bool) -> Image.Image:
    """The frame as a viewer on an sRGB screen shows it; transparent areas become white.

    Matrix and range are those of the frame's tags. Without a tag the matrix is BT.709 from 1280x720 on and
    BT.601 below, and the range is limited, as players assume. Interlaced frames stay woven. Raises PyAV's
    error for what libswscale cannot convert, and DataError for a colour curve without a rule. With `legacy`
    the untagged matrix is BT.601, and wide gamut and HDR are left as they are.
    """
    has_alpha = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
    is_hd = frame.width >= _HD_WIDTH or frame.height >= _HD_HEIGHT
    is_guessed = is_hd and frame.colorspace == _UNSPECIFIED and not (legacy or frame.format.is_rgb)
    converted = frame.reformat(
        format="rgba" if has_alpha else "rgb24",
        src_colorspace=Colorspace.ITU709 if is_guessed else None,
        dst_color_range=ColorRange.JPEG,
        threads=1,
    )
    decoded = Image.fromarray(converted.to_ndarray())
    rgb = decoded.convert("RGB")
    if not legacy:
        rgb = show_on_screen(rgb, frame.color_primaries, frame.color_trc)
    if not has_alpha:
        return rgb
    page = Image.new("RGB", rgb.size, "white")
    page.paste(rgb, mask=decoded.getchannel("A"))
    return page
