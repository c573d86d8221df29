"""Long texts in parts that tokenise on their own: the tokens of the parts, in order, are those of the text.

A piece of a document then costs the parts that it lies in, not all of the document. Parts end where a match
of Moonshot's pattern ends whatever is before and behind: between a letter or digit and a blank, and behind a
line break that something else than a blank follows.
"""

import re
from collections.abc import Iterator

PART_CHARACTERS = 1000
"""Shortest part, but for the last: about 250 tokens, so a piece costs little more than its own."""
_BOUNDARY = re.compile(r"(?<=[A-Za-z0-9\u4e00-\u9fff])(?=[ \n])|(?<=\n)(?=\S)")


def cut_at_boundaries(text: str) -> Iterator[str]:
    """The parts of a text in order, each of `PART_CHARACTERS` and as many more as to the next boundary."""
    start = 0
    while (found := _BOUNDARY.search(text, start + PART_CHARACTERS)) is not None:
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]
