"""Images and animated images, decoded by Pillow, as a browser shows them."""

import io
from collections.abc import Iterator
from fractions import Fraction
from functools import partial

from PIL import ExifTags, Image, ImageOps, ImageSequence

from k25_train.data.decode.apng import apng_frames, is_apng
from k25_train.data.decode.clock import DEFAULT_DELAY_S, MIN_DELAY_S, Clock, Shown
from k25_train.data.decode.frame import Frame
from k25_train.data.decode.gif import gif_frames, is_gif
from k25_train.data.decode.picture_colour import PictureFile, to_rgb
from k25_train.errors import DataError

PICTURE_FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX"),
    *("PNG", "PPM", "PSD", "QOI", "SGI", "TGA", "TIFF", "WEBP"),
)
"""Pillow's names of the formats that are read. Of its others, some start a program (EPS), some hold
measurements rather than pictures (FITS, GRIB)."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Value of the orientation tag -> what it asks for. Pillow's turns are counterclockwise."""
_OF_COLOUR = ("icc_profile", "srgb", "gamma")
"""What Pillow tells of a PNG's colours."""
QUARTER_TURNS = (5, 6, 7, 8)
"""Values of the orientation tag by which width and height are swapped."""
_STILL = Shown(Fraction(0), Fraction(0), Clock(Fraction(1), Fraction(0)))


def picture_frame(data: bytes, *, legacy: bool) -> Frame:
    """The image in a file; of an animated one the first frame. Raises Pillow's errors, or DataError."""
    if is_gif(data) and not legacy:
        composed, _ = next(gif_frames(data), (None, 0))
        if composed is None:
            raise OSError("the file has no picture")
        rgb = to_rgb(composed, PictureFile(data, legacy))
        return Frame(rgb.size, composed.mode, _STILL, lambda: rgb)
    with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        rgb = to_rgb(image, PictureFile(data, legacy))
        return Frame(rgb.size, image.mode, _STILL, lambda: rgb)


def animation_frames(data: bytes, *, legacy: bool) -> Iterator[Frame]:
    """All frames of an animated image in the order of display, turned unless `legacy`."""
    file = PictureFile(data, legacy)
    with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if not legacy else 1
        start_s = Fraction(0)
        first_delay_s: Fraction | None = None
        for frame, delay_ms in _pillow_frames(image) if legacy else _composed_frames(image, data):
            delay_s = _delay_s(delay_ms)
            first_delay_s = first_delay_s or delay_s
            size = frame.size[::-1] if orientation in QUARTER_TURNS else frame.size
            shown = Shown(start_s, delay_s, Clock(first_delay_s, Fraction(0)))
            yield Frame(size, frame.mode, shown, partial(_upright, frame, file, orientation))
            start_s += delay_s


def _composed_frames(image: Image.Image, data: bytes) -> Iterator[tuple[Image.Image, float]]:
    """As `_pillow_frames`, but composed as in browsers where Pillow does it otherwise."""
    if is_gif(data):
        yield from gif_frames(data)
    elif is_apng(data):
        for frame, delay_ms in apng_frames(data):
            frame.info = {name: image.info[name] for name in _OF_COLOUR if name in image.info}
            yield frame, delay_ms
    else:
        yield from _pillow_frames(image)


def _pillow_frames(image: Image.Image) -> Iterator[tuple[Image.Image, float]]:
    """Each frame, valid until the next one is requested, and its delay in ms."""
    for number, frame in enumerate(ImageSequence.Iterator(image)):
        frame.load()
        has_default = getattr(image, "default_image", False) and getattr(image, "n_frames", 1) > 1
        if number == 0 and has_default:
            continue  # an APNG's picture for programs that show no animation
        yield frame, frame.info.get("duration", 0)


def _delay_s(milliseconds: float) -> Fraction:
    if not 0 <= milliseconds < float("inf"):
        raise DataError(f"shows a frame for {milliseconds} ms")
    # Delays are whole milliseconds, but in APNG fractions of a second: the microsecond is exact enough.
    delay_s = Fraction(round(milliseconds * 1000), 1_000_000)
    return DEFAULT_DELAY_S if delay_s <= MIN_DELAY_S else delay_s


def _upright(frame: Image.Image, file: PictureFile, orientation: int) -> Image.Image:
    # The frame itself is left alone: later ones may be painted over it.
    turn = _TURNS.get(orientation)
    rgb = to_rgb(frame, file)
    return rgb if turn is None else rgb.transpose(turn)
