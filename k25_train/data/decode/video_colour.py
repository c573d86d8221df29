"""Decoded video frames as eight-bit sRGB."""

import av
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

_UNSPECIFIED = 2
"""Of a frame's colour tags (ITU-T H.273)."""
_HD_WIDTH, _HD_HEIGHT = 1280, 720
_WIDE_PRIMARIES = (ColorPrimaries.BT2020, ColorPrimaries.SMPTE431, ColorPrimaries.SMPTE432)
_OTHER_CURVES = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67, ColorTrc.LINEAR)
"""Whose values, shown as they are, look nothing like the scene: HDR and linear light."""


def to_rgb(frame: av.VideoFrame, *, legacy: bool) -> Image.Image:
    """The frame as a viewer on an sRGB screen shows it; transparent areas become white.

    Matrix and range are those of the frame's tags. Without a tag the matrix is BT.709 from 1280x720 on and
    BT.601 below, and the range is limited, as players assume. Wide gamut (BT.2020, P3) and HDR (PQ, HLG) are
    mapped to BT.709 by libswscale; the small difference between the primaries of BT.601 and BT.709 is
    ignored, as by most players. Interlaced frames stay woven. Raises PyAV's error for what libswscale cannot
    convert. With `legacy` the untagged matrix is BT.601 and nothing is mapped.
    """
    has_alpha = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
    is_hd = not legacy and (frame.width >= _HD_WIDTH or frame.height >= _HD_HEIGHT)
    guessed = Colorspace.ITU709 if is_hd and frame.colorspace == _UNSPECIFIED else None
    is_mapped = frame.color_primaries in _WIDE_PRIMARIES or frame.color_trc in _OTHER_CURVES
    is_mapped = is_mapped and not legacy
    converted = frame.reformat(
        format="rgba" if has_alpha else "rgb24",
        src_colorspace=None if frame.format.is_rgb else guessed,
        dst_color_range=ColorRange.JPEG,
        dst_color_primaries=ColorPrimaries.BT709 if is_mapped else None,
        dst_color_trc=ColorTrc.BT709 if is_mapped else None,
        threads=1,
    )
    picture = Image.fromarray(converted.to_ndarray())
    if not has_alpha:
        return picture
    page = Image.new("RGB", picture.size, "white")
    page.paste(picture, mask=picture.getchannel("A"))
    return page
