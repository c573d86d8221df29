"""Long texts in the parts that Kimi K2's tokenizer (`tokenization_kimi.py`) hands to tiktoken one by one.

tiktoken's pattern matching fails on runs of some 400,000 blanks, so the release cuts every text before it:
every 400,000 characters, and within such a stretch wherever 25,000 characters in a row are all blank or all
not blank. Tokens do not cross a cut, so the cuts are part of what the text's tokens are.
"""

import re
from collections.abc import Iterator
from types import TracebackType

MAX_CHARACTERS = 400_000
"""Longest stretch that is looked at as one."""
MAX_RUN = 25_000
"""Longest run of blanks, or of other characters, in a part. Blank is what `str.isspace` and `\\s` call so."""
_RUN = re.compile(r"\s+|\S+")


def cut_long_runs(text: str) -> Iterator[str]:
    """The parts of a text, in order; joined they are the text. One empty part for an empty text."""
    if len(text) <= MAX_RUN:
        yield text
        return
    for start in range(0, len(text), MAX_CHARACTERS):
        stretch = text[start : start + MAX_CHARACTERS]
        cuts = [0, *_cuts(stretch), len(stretch)]
        yield from (stretch[cuts[i] : cuts[i + 1]] for i in range(len(cuts) - 1))


def _cuts(stretch: str) -> Iterator[int]:
    """Positions at which runs that are too long are cut, each counted from its run's first character."""
    # Such a run covers a multiple of MAX_RUN, so only runs at those positions are looked at: words would take
    # as long to find as to tokenise.
    done = 0
    for probe in range(0, len(stretch), MAX_RUN):
        if probe < done:
            continue
        start = probe - _common_end(stretch[max(done, probe - MAX_RUN) : probe], stretch[probe])
        done = _match(stretch, probe).end()
        yield from range(start + MAX_RUN, done, MAX_RUN)


def _common_end(before: str, character: str) -> int:
    """How many characters at the end of `before` are of the same kind as `character`."""
    if not before or before[-1].isspace() != character.isspace():
        return 0
    return _match(before[::-1], 0).end()


def _match(text: str, position: int) -> re.Match[str]:
    found = _RUN.match(text, position)
    if found is None:
        raise AssertionError("every character is blank or not")
    return found


class PanicErrors:
    """Turns a panic of a library written in Rust into RuntimeError.

    It arrives as a BaseException, which no caller that handles errors expects.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and kind.__module__ == "pyo3_runtime":
            raise RuntimeError(f"the tokenizer's library panicked ({error})") from error
