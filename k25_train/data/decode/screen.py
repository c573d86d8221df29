"""Colours of wide gamut and HDR as an sRGB screen shows them.

Curves and primaries are numbered as in ITU-T H.273. How HDR looks on another screen is nobody's standard;
this is our choice, after ITU-R BT.2408: diffuse white (203 cd/m²) becomes nearly white, what is brighter is
compressed above it, and colours outside of the screen's are clipped.
"""

from functools import lru_cache

import numpy as np
from PIL import Image

from k25_train.errors import DataError

_SDR_CURVES = frozenset({0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 14, 15})
"""All are shown alike, as players do; 0, 2 and 3 say nothing."""
_LINEAR, _PQ, _HLG = 8, 16, 18
_TO_BT709 = {
    9: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    11: ((1.1575, -0.1550, -0.0025), (-0.0415, 1.0455, -0.0040), (-0.0181, -0.0785, 1.0966)),
    12: ((1.2249, -0.2247, 0.0), (-0.0420, 1.0419, 0.0), (-0.0196, -0.0786, 1.0979)),
}
"""BT.2020 (ITU-R BT.2087), DCI-P3 and Display P3 in linear light. Other primaries are close to BT.709's."""
_WHITE_NITS = 203
_HLG_PEAK_NITS = 1000
_PQ_PEAK_NITS = 10_000
_KNEE = 0.8


def show_on_screen(rgb: Image.Image, primaries: int, curve: int) -> Image.Image:
    """Eight-bit values of these primaries and curve as sRGB. Raises DataError for a curve without a rule."""
    if curve in _SDR_CURVES and primaries not in _TO_BT709:
        return rgb
    light = _light_of_codes(curve)[np.asarray(rgb)]
    if curve == _HLG:  # from scene to screen, with the system gamma of 1.2
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)
        light = light * (luminance[..., None] ** np.float32(0.2) * (_HLG_PEAK_NITS / _WHITE_NITS))
    light = light @ np.array(_TO_BT709.get(primaries, np.eye(3)), dtype=np.float32).T
    if curve in (_PQ, _HLG):
        light = _compress(light)
    values = _from_light(light.clip(0, 1), curve)
    return Image.fromarray((values * 255).round().astype(np.uint8))


@lru_cache(maxsize=8)
def _light_of_codes(curve: int) -> np.ndarray:
    """[256] float32: linear light of each eight-bit value, diffuse white at 1 (of HLG the scene's light)."""
    values = np.arange(256) / 255
    if curve in _SDR_CURVES:
        light = values**2.4
    elif curve == _LINEAR:
        light = values
    elif curve == _PQ:  # SMPTE ST 2084
        power = values ** (32 / 2523)
        share = ((power - 107 / 128).clip(0) / (2413 / 128 - 2392 / 128 * power)) ** (16384 / 2610)
        light = share * (_PQ_PEAK_NITS / _WHITE_NITS)
    elif curve == _HLG:  # ITU-R BT.2100
        upper = (np.exp((values - 0.55991073) / 0.17883277) + 0.28466892) / 12
        light = np.where(values <= 0.5, values**2 / 3, upper)
    else:
        raise DataError(f"has the colour curve {curve} of ITU-T H.273, which has no agreed look on a screen")
    return light.astype(np.float32)


def _compress(light: np.ndarray) -> np.ndarray:
    """Brightness above the knee approaches 1, the hue is kept."""
    brightest = light.max(axis=-1, keepdims=True).clip(1e-6)
    above = (brightest - _KNEE).clip(0)
    shown = np.where(brightest <= _KNEE, brightest, _KNEE + (1 - _KNEE) * above / (above + (1 - _KNEE) / 4))
    return np.asarray(light * shown / brightest)


def _from_light(light: np.ndarray, curve: int) -> np.ndarray:
    # Values of SDR video are shown as if they were sRGB's, so they go back by the curve that they came by.
    if curve in _SDR_CURVES:
        return np.asarray(light ** (1 / 2.4))
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
