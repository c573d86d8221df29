"""Pillow's images of every depth and colour model as eight-bit sRGB, or refused with the reason."""

import io
import struct
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from k25_train.data.decode.screen import show_on_screen
from k25_train.errors import DataError

_PNG_HEAD = b"\x89PNG\r\n\x1a\n"
_WHITE_IS_ZERO = 0
_SIGNED = 2
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339
_SRGB_GAMMA = 1 / 2.2
_PROFILE_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}
"""Colour space of an ICC profile -> the mode that it describes."""


@dataclass(frozen=True, slots=True)
class PictureFile:
    """Bytes of an image file, for what Pillow does not tell of it."""

    data: bytes
    legacy: bool
    """Decode as an index of version 1 was meant: without colour management."""

    @property
    def png_depth(self) -> int:
        """Bits per sample of a PNG; 8 for other formats."""
        return self.data[24] if self.data.startswith(_PNG_HEAD) else 8

    @property
    def colour_codes(self) -> tuple[int, int]:
        """(primaries, curve) by ITU-T H.273 as PNG and AVIF state them; 1, 13 (sRGB) if they do not."""
        if self.data.startswith(_PNG_HEAD):
            at = self.data.find(b"\0\0\0\x04cICP", 0, self.data.find(b"IDAT"))
            return (self.data[at + 8], self.data[at + 9]) if at >= 0 else (1, 13)
        if self.data[4:8] == b"ftyp":
            at = self.data.find(b"colrnclx")
            if at >= 0:
                primaries, curve = struct.unpack_from(">HH", self.data, at + 8)
                return primaries, curve
        return 1, 13


def to_rgb(image: Image.Image, file: PictureFile) -> Image.Image:
    """The image on a white page, in sRGB.

    Samples of 16 bits keep their high byte. An ICC profile is applied (relative colorimetric, black point
    compensated); one that is broken or of another colour model is ignored, as browsers do; without one,
    values are sRGB, unless a PNG states a gamma or a file codes of H.273. Raises DataError where no rule says
    what a viewer shows: samples of 32 bits or with a sign.
    """
    if file.legacy:
        return _on_white(*split_alpha(image, file))
    primaries, curve = file.colour_codes
    profile = image.info.get("icc_profile")
    colours, alpha = split_alpha(image, file)
    if profile:
        rgb = _apply_profile(colours, profile)
    else:
        gamma = _SRGB_GAMMA if "srgb" in image.info else image.info.get("gamma", _SRGB_GAMMA)
        rgb = show_on_screen(_apply_gamma(_as_rgb(colours), gamma), primaries, curve)
    return _on_white(rgb, alpha)


def changes_colours(image: Image.Image, file: PictureFile) -> bool:
    """Whether `to_rgb` does more to an opaque image than to take its values for sRGB."""
    profile = image.info.get("icc_profile")
    if profile:
        return _transform(profile, "RGB" if image.mode in ("1", "P") else image.mode) is not None
    gamma = _SRGB_GAMMA if "srgb" in image.info else image.info.get("gamma", _SRGB_GAMMA)
    return file.colour_codes != (1, 13) or _is_another(gamma)


def _on_white(colours: Image.Image, alpha: Image.Image | None) -> Image.Image:
    rgb = _as_rgb(colours)
    if alpha is None:
        return rgb
    page = Image.new("RGB", rgb.size, "white")
    page.paste(rgb, mask=alpha)
    return page


def split_alpha(image: Image.Image, file: PictureFile) -> tuple[Image.Image, Image.Image | None]:
    """Colours without transparency, in eight bits, and the opacity of each pixel."""
    if _SIGNED in _tiff_values(image, _TIFF_SAMPLE_FORMAT):
        raise DataError("has samples with a sign, and nothing says which value is black")
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _from_deep_grey(image)
    if not image.has_transparency_data:
        return image, None
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and file.png_depth == 16:
        raise DataError(
            "is a PNG of 16 bits with one transparent colour, of which only eight bits are decoded"
        )
    if image.mode == "L" and isinstance(transparent, int):
        # Pillow scales pixels of 2 and 4 bits to eight, but not the transparent value.
        level = transparent * 255 // (2**file.png_depth - 1)
        return image, image.point([0 if value == level else 255 for value in range(256)])
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    return rgba.convert("RGB" if image.mode != "LA" else "L"), rgba.getchannel("A")


def _from_deep_grey(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    is_scaled = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))
    if not is_scaled:
        raise DataError(f"has 32-bit samples (mode {image.mode}), and nothing says which value is white")
    values = np.asarray(image)
    transparent = image.info.get("transparency")
    alpha = (
        None
        if transparent is None
        else Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    )
    bits = min(_tiff_values(image, _TIFF_BITS) or (16,))
    grey = (values >> (bits - 8)).astype(np.uint8)
    if _tiff_values(image, _TIFF_PHOTOMETRIC) == (_WHITE_IS_ZERO,):
        grey = 255 - grey
    return Image.fromarray(grey), alpha


def _tiff_values(image: Image.Image, tag: int) -> tuple[int, ...]:
    """The values of a tag; none if the image has no such tag or is no TIFF."""
    value = getattr(image, "tag_v2", {}).get(tag, ())
    return value if isinstance(value, tuple) else (value,)


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    if image.mode in ("1", "P", "YCbCr", "LAB", "HSV"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    transform = _transform(profile, image.mode)
    if transform is None:
        return image.convert("RGB")
    return ImageCms.applyTransform(image, transform) or image


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """To sRGB; None if the profile is sRGB already, broken, or of another mode."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(source)
        if "sRGB" in name or _PROFILE_MODES.get(source.profile.xcolor_space.strip()) != mode:
            return None
        return ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError):
        return None


def _apply_gamma(rgb: Image.Image, gamma: float) -> Image.Image:
    """Values that were raised to `gamma` when the file was written, as sRGB has them."""
    if not _is_another(gamma):
        return rgb
    return rgb.point([round(255 * (value / 255) ** (_SRGB_GAMMA / gamma)) for value in range(256)] * 3)


def _is_another(gamma: float) -> bool:
    """Whether values raised to `gamma` are not those of sRGB."""
    return gamma > 0 and abs(gamma / _SRGB_GAMMA - 1) >= 0.05


def _as_rgb(image: Image.Image) -> Image.Image:
    """The image itself where it is RGB, which Pillow would copy."""
    return image if image.mode == "RGB" else image.convert("RGB")
