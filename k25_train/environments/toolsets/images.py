"""Images that tools show, brought to a form that every engine and the trainer read: PNG of a bounded size.

What a sandbox hands over is untrusted: it is decoded in memory with a limit of pixels, and told if it cannot
be.
"""

import io
import warnings

from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 1 << 20
"""Of an image that the policy sees; a larger one is reduced. Our choice, 1,300 vision tokens."""
MAX_DECODED = 64 << 20
"""Pixels of an image that is decoded at all. Our choice."""
MIN_SIDE = 28
"""Pixels of the shorter side, a vision token; smaller ones are enlarged. Our choice."""
MAX_ASPECT = 32.0
"""Longer over shorter side; nothing can be seen of what is thinner. Our choice."""
_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")


def as_shown(content: bytes, max_pixels: int = MAX_PIXELS) -> bytes:
    """An image file as PNG with at most so many pixels. Raises ValueError, with the reason, for others."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_DECODED:
                    raise ValueError(f"is {width}x{height}, more than {MAX_DECODED} pixels")
                if max(width, height) > MAX_ASPECT * min(width, height):
                    raise ValueError(f"is {width}x{height}: too thin to be seen")
                return _written(image, max_pixels)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"cannot be read: {error}") from error


def _written(image: Image.Image, max_pixels: int) -> bytes:
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    if has_alpha:
        # As on a page: what is transparent is white.
        layer = image.convert("RGBA")
        plain = Image.new("RGB", layer.size, "white")
        plain.paste(layer, mask=layer.getchannel("A"))
    else:
        plain = image.convert("RGB")
    width, height = plain.size
    scale = min(1.0, (max_pixels / (width * height)) ** 0.5)
    scale = max(scale, MIN_SIDE / min(width, height))
    if scale != 1.0:
        size = (max(MIN_SIDE, int(width * scale)), max(MIN_SIDE, int(height * scale)))
        plain = plain.resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    plain.save(out, "PNG", compress_level=3)
    return out.getvalue()
