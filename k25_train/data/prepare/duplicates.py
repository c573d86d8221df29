"""Documents whose id was there before, found with bounded memory however many there are."""

from collections.abc import Sequence

import numpy as np

from k25_train.data.prepare.parts import Parts
from k25_train.data.prepare.units import Unit

IDS_AT_ONCE = 50_000_000
"""Ids that are compared together, of 16 bytes each. Our choice."""


def find_duplicates(units: Sequence[Unit], num_documents: int, parts: Parts) -> dict[int, list[int]]:
    """Unit's number -> positions of its documents whose id an earlier document has.

    Ids are compared by 64 bits of a hash: among 1e9 documents, one in 30 such corpora loses one that is none.
    """
    num_passes = -(-num_documents // IDS_AT_ONCE)
    found: dict[int, list[int]] = {}
    for number in range(num_passes):
        hashes, places = [], []
        for position, unit in enumerate(units):
            ids = parts.hashes(unit)
            mine = np.flatnonzero(ids % np.uint64(num_passes) == number)
            hashes.append(ids[mine])
            places.append((np.uint64(position) << np.uint64(40)) | mine.astype(np.uint64))
        all_hashes, all_places = np.concatenate(hashes), np.concatenate(places)
        # A stable sort keeps the order of input among equal ones; all but the first are duplicates.
        order = np.argsort(all_hashes, kind="stable")
        is_again = np.flatnonzero(np.diff(all_hashes[order]) == 0) + 1
        for place in np.sort(all_places[order[is_again]]):
            unit = units[int(place) >> 40]
            found.setdefault(unit.number, []).append(int(place) & (2**40 - 1))
    return {number: sorted(positions) for number, positions in found.items()}
