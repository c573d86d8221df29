"""What every decoder yields."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from k25_train.data.decode.clock import Shown


@dataclass(frozen=True, slots=True)
class Frame:
    """A decoded frame, valid until the next one is requested."""

    size: tuple[int, int]
    """Width and height as shown, in square pixels."""
    pixel_format: str
    """The decoder's name of it."""
    shown: Shown
    """When it is shown; an image's is not looked at."""
    to_rgb: Callable[[], Image.Image]
    """Converts it, which is costly, and turns it upright. If pixels are not square, the picture has another
    size than `size`: resizing it stretches it."""
