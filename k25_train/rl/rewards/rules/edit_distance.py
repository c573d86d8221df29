"""OCR: one minus the edit distance over the longer length.

Source: K2.5, section 4.4 ("normalized edit distance"). What counts as the same text before that is not
disclosed, our choice: NFC, every run of white space as one blank.
"""

import unicodedata

from k25_train.environments.base import ACCURACY, Verdict, scored
from k25_train.rl.rewards.faults import MAX_CHARACTERS, ResponseFaultError

MAX_OCR_CHARACTERS = 20_000
"""Longest text, in characters, on either side: beyond it the time would count. Source: our choice."""


def ocr_similarity(found: str, expected: str) -> Verdict:
    """1 - edits / characters of the longer text; 1 if both are empty.

    Raises ResponseFaultError for a text that is too long to judge.
    """
    if len(found) > max(MAX_OCR_CHARACTERS, len(expected) * 4) or len(found) > MAX_CHARACTERS:
        raise ResponseFaultError(f"huge: {len(found)} characters, where {len(expected)} were expected")
    one, other = same_blanks(found), same_blanks(expected)
    longer = max(len(one), len(other))
    similarity = 1 - edit_distance(one, other) / longer if longer else 1.0
    return scored(similarity, {ACCURACY: similarity})


def same_blanks(text: str) -> str:
    """NFC, with one blank for every run of white space, and none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def edit_distance(one: str, other: str) -> int:
    """Fewest characters to insert, delete or replace (Levenshtein).

    A column of the table of distances is two integers with a bit for each row, so a column takes a few
    operations on integers. Source: Myers (1999), in Hyyrö's form (2003).
    """
    if len(one) > len(other):
        one, other = other, one
    if not one:
        return len(other)
    places: dict[str, int] = {}
    for position, character in enumerate(one):
        places[character] = places.get(character, 0) | 1 << position
    everything = (1 << len(one)) - 1
    last = 1 << (len(one) - 1)
    higher, lower = everything, 0
    distance = len(one)
    for character in other:
        same = places.get(character, 0)
        diagonal = (((same & higher) + higher) ^ higher) | same | lower
        rises = lower | (everything & ~(diagonal | higher))
        falls = diagonal & higher
        distance += bool(rises & last) - bool(falls & last)
        # The first row rises by one with every column.
        rises = (rises << 1 | 1) & everything
        falls = (falls << 1) & everything
        higher = falls | (everything & ~(diagonal | rises))
        lower = diagonal & rises
    return distance
