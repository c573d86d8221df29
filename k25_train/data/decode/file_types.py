"""What a media file is by its first bytes, whatever its name, and an image's size without decoding it."""

import io
import warnings

from PIL import ExifTags, Image

from k25_train.data.decode.frames import DecoderErrors, MediaInfo, probe_media
from k25_train.data.decode.pictures import PICTURE_FORMATS, QUARTER_TURNS
from k25_train.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "png", "webp", "gif", "tif", "tiff", "avif", "bmp", "jp2")
VIDEO_EXTENSIONS = (
    *("mp4", "m4v", "mov", "webm", "mkv", "avi", "mpg", "mpeg", "ts", "flv", "wmv", "asf", "ogv", "3gp"),
    *("h264", "hevc"),
)
FORMAT_OF_EXTENSION = {"jpeg": "jpg", "jpe": "jpg", "tif": "tiff"}
"""Extensions of which another one is the format's name."""
_MAGIC = (
    (0, b"\xff\xd8\xff", "image", "jpg"),
    (0, b"\x89PNG\r\n\x1a\n", "image", "png"),
    (0, b"GIF87a", "image", "gif"),
    (0, b"GIF89a", "image", "gif"),
    (0, b"II*\0", "image", "tiff"),
    (0, b"MM\0*", "image", "tiff"),
    (0, b"BM", "image", "bmp"),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "image", "jp2"),
    (8, b"WEBP", "image", "webp"),
    (8, b"AVI ", "video", "avi"),
    (4, b"ftypavif", "image", "avif"),
    (4, b"ftypavis", "image", "avif"),
    (4, b"ftyphei", "image", "heic"),
    (4, b"ftypmif1", "image", "heic"),
    (4, b"ftypqt", "video", "mov"),
    (4, b"ftyp", "video", "mp4"),
    (0, b"\x1aE\xdf\xa3", "video", "mkv"),
    (0, b"FLV\x01", "video", "flv"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "video", "asf"),
    (0, b"OggS", "video", "ogv"),
    (0, b"\0\0\x01\xba", "video", "mpg"),
)
"""(offset, bytes there, media type, format): the first that fits."""
_HEADER_SIZED = ("jpg", "png", "webp", "tiff", "avif")
"""Formats whose header has the size that decoding finds (tests/unit/data/test_file_types.py)."""
_PNG_ORIENTATION = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
"""Where a PNG may state an orientation that Pillow knows."""


def media_type_of_extension(extension: str) -> str | None:
    """`image`, `video`, or None for a file that is neither by its name."""
    if extension in IMAGE_EXTENSIONS:
        return "image"
    return "video" if extension in VIDEO_EXTENSIONS else None


def sniff(data: bytes, extension: str) -> tuple[str, str]:
    """Media type and format of a file by its content; by its name where content cannot tell.

    Raises DataError, with the reason alone, for a file that is certainly no media file.
    """
    if not data:
        raise DataError("is empty")
    for offset, magic, media_type, file_format in _MAGIC:
        if data.startswith(magic, offset):
            return media_type, ("webm" if (file_format, extension) == ("mkv", "webm") else file_format)
    # Some video formats begin with no fixed bytes; their decoder has the word.
    if extension in VIDEO_EXTENSIONS:
        return "video", extension
    raise DataError(f"is no image: it begins with {data[:12]!r}")


def media_info(data: bytes, media_type: str, file_format: str) -> MediaInfo:
    """Sizes as `probe_media` finds them, of most images without decoding them.

    A header is read in 0.05 ms where a photo of 1 megapixel is decoded in 10. Damage behind it is found when
    the image is read, where it is a skipped sample, or by `k25-data verify`.
    Videos are decoded: no header says when each frame is shown. Raises DataError with the reason.
    """
    if media_type == "video" or file_format not in _HEADER_SIZED:
        return probe_media(data, media_type, file_format)
    with (
        DecoderErrors(),
        warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
        Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as image,
    ):
        width, height = image.size
        # Pillow has turned the size of a TIFF already, and its pixels as they are loaded. A PNG may say
        # behind its pixels how it is turned, for which Pillow decodes them.
        may_turn = file_format != "tiff" and (
            file_format != "png" or any(mark in data for mark in _PNG_ORIENTATION)
        )
        if may_turn and image.getexif().get(ExifTags.Base.Orientation) in QUARTER_TURNS:
            width, height = height, width
    return MediaInfo(width=width, height=height, num_frames=1, duration_s=0.0)
