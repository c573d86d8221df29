"""How a viewer places decoded pixels: turned and mirrored as the container says, stretched to square ones."""

import struct
from dataclasses import dataclass
from fractions import Fraction

from PIL import Image

from k25_train.data.decode.cropping import NOTHING_CROPPED, Cropping
from k25_train.errors import DataError

_Turn = Image.Transpose | None
_TURNS: dict[tuple[int, int, int, int], _Turn] = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""(a, b, c, d) of the display matrix, which takes (x, y) to (ax + cy, bx + dy) with y downwards -> what to
do. Pillow's turns are counterclockwise."""


@dataclass(frozen=True, slots=True)
class Display:
    """What is done to a decoded picture before it is shown."""

    turn: _Turn
    """None leaves it as it is."""
    pixel_aspect: Fraction
    """Width of a decoded pixel over its height."""
    cropping: Cropping
    """What the container cuts off the coded picture."""

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height as shown, of a picture decoded to `width` x `height`.

        Pixels that are not square are widened or heightened, so that no line and no column is lost.
        """
        left, top, right, bottom = self.cropping.box(width, height)
        width, height = right - left, bottom - top
        if self.pixel_aspect > 1:
            width = round(width * self.pixel_aspect)
        else:
            height = round(height / self.pixel_aspect)
        turned = self.turn is not None and self.turn not in _KEEPS_SIDES
        return (height, width) if turned else (width, height)

    def place(self, picture: Image.Image) -> Image.Image:
        """The picture cropped and turned; stretching is left to the one resize of preprocessing."""
        box = self.cropping.box(*picture.size)
        if box != (0, 0, *picture.size):
            picture = picture.crop(box)
        return picture if self.turn is None else picture.transpose(self.turn)


AS_CODED = Display(None, Fraction(1), NOTHING_CROPPED)
"""Neither cropped nor turned nor stretched."""
_KEEPS_SIDES = (
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.ROTATE_180,
)


def turn_of(display_matrix: bytes) -> _Turn:
    """What a container's display matrix does, of nine native 32-bit integers (libavutil/display.h).

    Raises DataError unless it is a quarter turn, mirrored or not.
    """
    a, b, _, c, d, *_ = struct.unpack("=9i", display_matrix)
    size = max(abs(a), abs(b))
    signs = tuple((abs(value) * 2 > size) * (1 if value > 0 else -1) for value in (a, b, c, d))
    near = all(
        abs(value - sign * size) * 100 <= size for value, sign in zip((a, b, c, d), signs, strict=True)
    )
    if size == 0 or not near or signs not in _TURNS:
        raise DataError(f"is to be shown by the display matrix {a}, {b}, {c}, {d}, which is no quarter turn")
    return _TURNS[signs]


def pixel_aspect_of(stated: Fraction | None) -> Fraction:
    """The aspect of a pixel that a file states, where 0 or nothing means that it is square."""
    return stated if stated is not None and stated > 0 else Fraction(1)
