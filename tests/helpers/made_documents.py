"""Documents of given lengths, without files: for what streams and plans do with them."""

import numpy as np

from k25_train.data.mix.lengths import Measured
from k25_train.data.mix.stream import SourceStream
from k25_train.data.mix.windows import Windows


class MadeDocuments:
    """A source of text documents, or of some that stay whole."""

    def __init__(self, name: str, lengths: np.ndarray, *, is_cut: bool) -> None:
        self.name, self.num_items, self.is_cut = name, len(lengths), is_cut
        self._lengths = lengths

    def items(self, positions: np.ndarray) -> np.ndarray:
        """All of them."""
        return positions

    def measure(self, items: np.ndarray, *, is_first: bool) -> Measured:
        """Nothing for the vision tower."""
        nothing = np.zeros(len(items) + 1, dtype=np.int64)
        return Measured(self._lengths[items], nothing, np.zeros((0, 3), dtype=np.int32))

    def nothing_usable(self) -> str:
        """See `stream.Documents`."""
        return "nothing"


def stream_of(
    lengths: np.ndarray,
    seq_len: int,
    *,
    number: int = 0,
    name: str = "made",
    is_cut: bool = False,
    epochs: float | None = None,
) -> SourceStream:
    """A stream of documents of these lengths."""
    documents = MadeDocuments(name, lengths, is_cut=is_cut)
    return SourceStream(number, documents, Windows(len(lengths), 3, name, shuffle=True), seq_len, epochs)
