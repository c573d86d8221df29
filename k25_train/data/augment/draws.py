"""Random numbers of augmentation: hashes of (seed, source, item, epoch), the same anywhere."""

import hashlib
from collections.abc import Callable

from k25_train.config.data import AugmentConfig
from k25_train.data.decode.items import AS_STORED
from k25_train.data.decode.view import View

Keys = Callable[[int, int], int]
"""From item and epoch to the key of what is drawn for it."""


def keys_of(augment: AugmentConfig, seed: int, source: str) -> Keys:
    """Of a source in training; all are `AS_STORED.key` where nothing is augmented."""
    if augment.is_off:
        return as_stored
    return lambda item, epoch: 1 + _hash(f"{seed}\0{source}\0{item}\0{epoch}") // 2


def as_stored(item: int, epoch: int) -> int:
    """Without augmentation, and in evaluations."""
    return AS_STORED.key


def uniform(key: int, *what: str | int) -> float:
    """A number in [0, 1)."""
    return (_hash("\0".join(map(str, (key, *what)))) >> 11) / 2**53


def is_mirrored(augment: AugmentConfig, key: int) -> bool:
    """Whether the images of a sample are mirrored: all or none, as one text speaks of all."""
    return uniform(key, "flip") < augment.flip


def colours(augment: AugmentConfig, key: int, number: int) -> View:
    """A view that changes colours alone, of image or video `number` of a sample."""
    brightness, contrast, saturation = (
        1 + augment.colour * (2 * uniform(key, number, name) - 1)
        for name in ("brightness", "contrast", "saturation")
    )
    return View(brightness=brightness, contrast=contrast, saturation=saturation)


def crop(augment: AugmentConfig, key: int, number: int, size: int, side: str) -> tuple[int, int]:
    """What is left of a side of `size` pixels: its first pixel and the one after its last."""
    num_cut = int(augment.crop * uniform(key, number, side, "cut") * size)
    first = int(uniform(key, number, side, "first") * (num_cut + 1))
    return first, size - num_cut + first


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
