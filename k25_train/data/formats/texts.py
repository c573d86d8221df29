"""The tokens of a stretch of a text: of a long one only the parts that the stretch lies in are encoded.

A document of many sequences is cut into as many pieces, which the shuffle gives to as many steps and ranks:
if each encoded all of the document, its cost would grow with the square of its length.
"""

from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

from k25_train.data.byte_cache import ByteCache
from k25_train.data.formats.records import SampleRecord
from k25_train.data.formats.sample_json import SampleError, Words
from k25_train.data.tokenizer import Tokenizer

PART_COUNTS_BYTES = 2**26
"""What counts of parts that are not in the shards may take: those of 4 billion tokens. Our choice."""


class TextTokens:
    """Encodes stretches of texts. Safe across threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._part_tokens = ByteCache[Sequence[int]](PART_COUNTS_BYTES, lambda counts: 4 * len(counts))

    def whole(self, words: Words, num_tokens: int) -> list[int]:
        """All tokens of a text. Raises SampleError, with the reason alone, if they are not `num_tokens`."""
        tokens = _guarded(lambda: self._tokenizer.encode(words.text))
        _check_number(len(tokens), num_tokens)
        return tokens

    def stretch(
        self, record: SampleRecord, segment: int, words: Words, num_tokens: int, start: int, stop: int
    ) -> list[int]:
        """Tokens `start` to `stop` of the text of a sample's segment.

        Where the counts of its parts are not stored with it, the first call encodes all of it to find them.
        Raises SampleError, with the reason alone, if its tokens are not `num_tokens`.
        """
        # 1. How many tokens each part has. Stored ones are not taken on trust: those used are counted again.
        parts = self._tokenizer.parts(words.text)
        counts: Sequence[int] = words.part_tokens
        if len(counts) != len(parts) or sum(counts) != num_tokens:
            key = (record.shard, record.offset, segment)
            counts = self._part_tokens.get(key, lambda: self._count(words.text))
            _check_number(sum(counts), num_tokens)

        # 2. The parts that the stretch lies in.
        ends = list(accumulate(counts))
        first, last = bisect_right(ends, start), bisect_right(ends, stop - 1)
        encoded = _guarded(lambda: self._tokenizer.encode_batch(parts[first : last + 1]))
        for number, tokens in enumerate(encoded, start=first):
            if len(tokens) != counts[number]:
                raise SampleError(
                    f"part {number} of a text has {len(tokens)} tokens, {counts[number]} are stored"
                )
        before = ends[first] - counts[first]
        return [token for tokens in encoded for token in tokens][start - before : stop - before]

    def _count(self, text: str) -> Sequence[int]:
        # Four bytes each, where a tuple takes some forty.
        return array("I", _guarded(lambda: self._tokenizer.part_tokens(text)))


def _check_number(found: int, expected: int) -> None:
    if found != expected:
        raise SampleError(f"a text has {found} tokens, the index says {expected}")


def _guarded[Result](encode: Callable[[], Result]) -> Result:
    try:
        return encode()
    except RuntimeError as error:
        raise SampleError(str(error)) from error
