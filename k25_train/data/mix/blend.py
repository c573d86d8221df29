"""Which kind of sample each sequence of the endless training stream holds. Pure.

Invariants, for shares that sum to 1 and are taken to 1/10,000:
- among the first n sequences of the stream, the number of any kind differs from n x share by less than one;
- the k-th sequence of a kind is followed by its (k+1)-th: none is left out or repeated;
- `locate(n)` depends on n and the shares alone, and costs the same for every n.
"""

from collections.abc import Mapping
from math import gcd

RESOLUTION = 10_000
"""Shares are rounded to one in this many."""


class Blend:
    """A periodic schedule of kinds that follows the shares as closely as whole sequences allow.

    One period is scheduled by earliest deadline: the j-th sequence of a kind with share p is released at
    slot floor((j-1)/p) and due by slot ceil(j/p). Such a schedule always exists (it is the
    chairman assignment problem), and earliest-deadline-first finds it, these being unit jobs.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        """`shares`: kind -> share of the sequences, positive; they are rescaled to sum to 1."""
        units = _to_units(shares)
        self._period = sum(units.values())
        self._counts = units
        self._schedule = _earliest_deadline_first(units, self._period)

    def locate(self, sequence: int) -> tuple[str, int]:
        """The kind of a sequence of the stream, and how many of that kind came before."""
        period, slot = divmod(sequence, self._period)
        kind, position = self._schedule[slot]
        return kind, period * self._counts[kind] + position


def _to_units(shares: Mapping[str, float]) -> dict[str, int]:
    """Shares as the smallest whole numbers in their ratio, after rounding to 1/RESOLUTION (at least one)."""
    total = sum(shares.values())
    units = {kind: max(1, round(RESOLUTION * share / total)) for kind, share in sorted(shares.items())}
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
