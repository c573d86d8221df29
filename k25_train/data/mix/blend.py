"""Which kind of sample each sequence of the endless training stream holds. Pure.

Invariants, for up to four kinds and shares of any number of decimals, which are rescaled to sum to 1:
- among the first n sequences of the stream, the number of any kind differs from n x share by less than one;
- the k-th sequence of a kind is followed by its (k+1)-th: none is left out or repeated;
- `locate(n)` depends on n and the shares alone, and costs the same for every n.

Shares in whole ten-thousandths, which most are, follow a table of one period. Others would need a table as
long as their common denominator; they follow a tree of choices between two.
"""

from collections.abc import Mapping
from fractions import Fraction
from math import gcd
from typing import Protocol

RESOLUTION = 10_000
"""Longest period that is kept as a table."""
_ROUNDING = Fraction(1, 10**9)
"""In units of 1/RESOLUTION: what sums and quotients of floats are off by at most; 10^13 sequences hide it."""


class Blend:
    """A schedule of kinds that follows the shares as closely as whole sequences allow."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        """`shares`: kind -> share of the sequences, positive; they are rescaled to sum to 1."""
        # As they are written: 0.1 is a tenth, though the float is not.
        exact = {kind: Fraction(str(share)) for kind, share in sorted(shares.items())}
        total = sum(exact.values())
        exact = {kind: share / total for kind, share in exact.items()}
        units = _whole_units(exact)
        self._order: _Order = _tree(exact) if units is None else _Period(units)

    def locate(self, sequence: int) -> tuple[str, int]:
        """The kind of a sequence of the stream, and how many of that kind came before."""
        return self._order.locate(sequence)


class _Order(Protocol):
    def locate(self, sequence: int) -> tuple[str, int]:
        """As `Blend.locate`."""


class _Period:
    """One period, scheduled by earliest deadline.

    The j-th sequence of a kind with share p is released at slot floor((j-1)/p) and due by slot ceil(j/p). A
    schedule always exists (it is the chairman assignment problem), and earliest-deadline-first finds it,
    these being unit jobs.
    """

    def __init__(self, units: Mapping[str, int]) -> None:
        self._period = sum(units.values())
        self._counts = units
        self._schedule = _earliest_deadline_first(units, self._period)

    def locate(self, sequence: int) -> tuple[str, int]:
        period, slot = divmod(sequence, self._period)
        kind, position = self._schedule[slot]
        return kind, period * self._counts[kind] + position


class _Kind:
    """A leaf of the tree: all sequences are of one kind."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def locate(self, sequence: int) -> tuple[str, int]:
        return self._kind, sequence


class _Pair:
    """Of the first n sequences, n x share rounded to the nearest go to one side, the others to the other.

    Each side is off by half a sequence at most, and a side of a side by half and less than another half.
    """

    def __init__(self, first: _Order, second: _Order, share: Fraction) -> None:
        """`share`: of the first in the two."""
        self._first, self._second = first, second
        self._numerator, self._denominator = share.numerator, share.denominator

    def locate(self, sequence: int) -> tuple[str, int]:
        before = self._count(sequence)
        if self._count(sequence + 1) > before:
            return self._first.locate(before)
        return self._second.locate(sequence - before)

    def _count(self, num_sequences: int) -> int:
        return (2 * self._numerator * num_sequences + self._denominator) // (2 * self._denominator)


def _tree(shares: Mapping[str, Fraction]) -> _Order:
    """The smaller half of the kinds against the larger, down to single ones."""
    kinds = sorted(shares, key=lambda kind: (shares[kind], kind))
    if len(kinds) == 1:
        return _Kind(kinds[0])
    first, second = (
        {kind: shares[kind] for kind in half} for half in (kinds[: len(kinds) // 2], kinds[len(kinds) // 2 :])
    )
    return _Pair(_tree(first), _tree(second), sum(first.values(), Fraction()) / sum(shares.values()))


def _whole_units(shares: Mapping[str, Fraction]) -> dict[str, int] | None:
    """Shares as the smallest whole numbers in their ratio; None if they are not whole in 1/RESOLUTION."""
    units = {kind: round(RESOLUTION * share) for kind, share in shares.items()}
    if any(abs(RESOLUTION * shares[kind] - unit) > _ROUNDING for kind, unit in units.items()):
        return None
    divisor = gcd(*units.values())
    return {kind: unit // divisor for kind, unit in units.items()}


def _earliest_deadline_first(units: Mapping[str, int], period: int) -> list[tuple[str, int]]:
    """[slot of the period] -> its kind, and how many of that kind come before in the period."""
    done = dict.fromkeys(units, 0)
    schedule: list[tuple[str, int]] = []
    for slot in range(period):
        # A kind's next sequence is released when its share of the slots so far calls for it; of the released
        # ones, that with the nearest deadline gets the slot.
        released = [kind for kind, unit in units.items() if done[kind] * period // unit <= slot]
        kind = min(released, key=lambda kind: -(-(done[kind] + 1) * period // units[kind]))
        schedule.append((kind, done[kind]))
        done[kind] += 1
    return schedule
