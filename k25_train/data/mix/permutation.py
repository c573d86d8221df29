"""Orders that are computed, never stored: a keyed permutation of [0, n), and the order of a few items.

A permutation of ten billion items is a Feistel network over the rectangle rows x columns that just holds
them: each round shifts one coordinate by a hash of the other, which is reversible whatever the hash is (Black
and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, there called generalised Feistel with cycle
walking). What lands outside of [0, n) is sent through it again. All of it is arithmetic of unsigned 64-bit
numbers, so that every machine and every version of NumPy gives the same order.
"""

import hashlib
from math import isqrt

import numpy as np

NUM_ROUNDS = 8
"""Four would do for a cipher with ideal round functions (Luby and Rackoff, 1988); the hash is a cheap one."""
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(32)


def key_of(*parts: str | int) -> int:
    """64 bits that depend on every part: seed, name of a source, epoch, purpose."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def hashed(values: np.ndarray, key: int) -> np.ndarray:
    """A hash of each value under a key, uint64: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    mixed = values.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
    mixed = (mixed ^ (mixed >> _SHIFTS[0])) * _MIX_1
    mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _MIX_2
    return mixed ^ (mixed >> _SHIFTS[2])


def shuffled(num_items: int, key: int) -> np.ndarray:
    """[n] int64: 0 to n - 1 in an order that depends on n and the key alone. For as many as fit in memory."""
    return np.argsort(hashed(np.arange(num_items), key), kind="stable")


class KeyedPermutation:
    """A bijection of [0, num_items) onto itself, in constant memory."""

    def __init__(self, num_items: int, key: int) -> None:
        """`num_items` is at least 1 and below 2^62; equal arguments give equal permutations."""
        self.num_items = num_items
        # The rectangle holds all items and hardly any more, so that few are sent through again.
        self._num_rows = isqrt(num_items - 1) + 1
        self._num_columns = -(-num_items // self._num_rows)
        self._keys = [key_of(key, "round", number) for number in range(NUM_ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Items at the given positions, int64 of the same shape [k]."""
        items = self._rounds(positions.astype(np.uint64))
        while len(outside := np.flatnonzero(items >= self.num_items)):
            items[outside] = self._rounds(items[outside])
        return items.astype(np.int64)

    def _rounds(self, values: np.ndarray) -> np.ndarray:
        num_rows, num_columns = self._num_rows, self._num_columns
        row, column = values // np.uint64(num_columns), values % np.uint64(num_columns)
        for number, key in enumerate(self._keys):
            if number % 2:
                column = _shifted(column, hashed(row, key), num_columns)
            else:
                row = _shifted(row, hashed(column, key), num_rows)
        return row * np.uint64(num_columns) + column


def _shifted(values: np.ndarray, hashes: np.ndarray, modulus: int) -> np.ndarray:
    """(value + hash) mod modulus, for a modulus below 2^31: the upper half of a hash is scaled to it."""
    shifted = values + (((hashes >> _SHIFTS[3]) * np.uint64(modulus)) >> _SHIFTS[3])
    return np.where(shifted >= modulus, shifted - np.uint64(modulus), shifted)
