"""Which images DALI shows exactly as the reference does, by their headers."""

import io
import struct

from PIL import ExifTags, Image

from k25_train.data.decode.apng import is_apng
from k25_train.data.decode.picture_colour import PictureFile, changes_colours
from k25_train.data.decode.view import View
from k25_train.data.formats.records import MediaSegment

_FORMATS = ("JPEG", "PNG", "WEBP")
_MODES = {"JPEG": ("L", "RGB"), "PNG": ("1", "L", "P", "RGB"), "WEBP": ("RGB",)}
"""Format -> Pillow's modes of what DALI 2.4's CPU decoder decodes to the same bytes."""
_SIMPLE_WEBP = (b"VP8 ", b"VP8L")
"""First chunks of the simple file format, the only one that DALI reads."""


def reason_for_reference(data: bytes, segment: MediaSegment, view: View) -> str:
    """Why the reference has to decode a file; empty if DALI may.

    Found in headers alone, by Pillow (about 0.05 ms). What is damaged or not what the index says goes to the
    reference as well, which names the fault.
    """
    if segment.type != "image":
        return "video"
    if segment.format_version == 1:
        return "index of version 1"
    if not view.is_plain:
        return "augmented"
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return _reason(image, data, segment)
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError):
        return "format or damage"


def _reason(image: Image.Image, data: bytes, segment: MediaSegment) -> str:
    name = str(image.format)
    if name not in _FORMATS:
        return f"format {name}"
    if image.size != (segment.width, segment.height):
        return "size, or turned"
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or 0):
        return "very large"
    if image.has_transparency_data:
        return "transparency"
    if image.mode not in _MODES[name] or PictureFile(data, legacy=False).png_depth > 8:
        return f"colours: {name} {image.mode}"
    if is_apng(data) or getattr(image, "is_animated", False):
        return "animated"
    if name == "WEBP" and data[12:16] not in _SIMPLE_WEBP:
        return "extended WebP"
    if changes_colours(image, PictureFile(data, legacy=False)):
        return "colour profile"
    # Pillow reads a PNG's EXIF only with its pixels, if it follows them.
    late_exif = name == "PNG" and b"eXIf" in data[-256 * 1024 :]
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) if "exif" in image.info else 1
    return "size, or turned" if late_exif or turned != 1 else ""
