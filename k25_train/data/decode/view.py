"""How a picture is shown to the tower: as it is, or cropped, mirrored and recoloured at random.

A view never changes the size of what the tower sees, so planning knows nothing of it: the rest of a crop is
scaled to the planned size.
"""

from dataclasses import dataclass

from PIL import Image, ImageEnhance

WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A change of all frames of an image or video."""

    box: tuple[float, float, float, float] = WHOLE
    """Left, top, right and bottom of what is left, in shares of width and height that are whole pixels."""
    flip: bool = False
    """Whether left and right are swapped, after cropping."""
    brightness: float = 1.0
    """Factor of brightness."""
    contrast: float = 1.0
    """Factor of contrast."""
    saturation: float = 1.0
    """Factor of saturation."""

    @property
    def is_plain(self) -> bool:
        """Whether it changes nothing."""
        return self == AS_IT_IS

    @property
    def moves(self) -> bool:
        """Whether anything in the picture is at another place."""
        return self.flip or self.box != WHOLE

    def of(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """The RGB image at the planned size. Without a change it is the release's resampling to the bit."""
        if self.box != WHOLE:
            width, height = image.size
            left, top, right, bottom = self.box
            box = (round(left * width), round(top * height), round(right * width), round(bottom * height))
            image = image.resize(size, Image.Resampling.BICUBIC, box)
        elif size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for enhancer, factor in (
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.saturation),
        ):
            if factor != 1:
                image = enhancer(image).enhance(factor)
        return image

    def point(self, x: float, y: float) -> tuple[float, float]:
        """Where a place of the picture is in the view, both in shares of width and height."""
        left, top, right, bottom = self.box
        x, y = (x - left) / (right - left), (y - top) / (bottom - top)
        return (1 - x if self.flip else x), y


AS_IT_IS = View()
"""Changes nothing."""
