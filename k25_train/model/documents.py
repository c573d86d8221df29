"""Where the documents of a micro-batch begin and end, in the forms that attention's kernels take.

Shapes: T tokens of all documents, N documents, R documents that there is room for (`document_room`).
"""

import functools
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from k25_train.plan.pass_sizes import document_room
from parallel.host.upload import upload


@dataclass(frozen=True)
class DocumentBounds:
    """Documents one after another without gaps; some of them are padding.

    Lengths are kept as Python integers in addition to the device's tensor, so that no layer waits for the
    device to read them.
    """

    lengths: tuple[int, ...]
    """Number of tokens of each document."""
    padding: frozenset[int]
    """Positions in `lengths` of what is no document, but padding."""
    table: Tensor
    """[2, R + 1] int32: how many tokens there are before each document, and how many of these are real.
    Behind the last document are empty ones, so that the shape does not depend on how many there are."""

    @classmethod
    def of(
        cls, lengths: Sequence[int], device: torch.device, padding: Collection[int] = ()
    ) -> "DocumentBounds":
        """Documents of these lengths; those at `padding` are padding. Nothing waits for the device."""
        real = (0 if position in padding else length for position, length in enumerate(lengths))
        width = document_room(len(lengths)) + 1
        rows = [[*itertools.accumulate(each, initial=0)] for each in (lengths, real)]
        table = torch.tensor([row + [row[-1]] * (width - len(row)) for row in rows], dtype=torch.int32)
        return cls(tuple(lengths), frozenset(padding), upload(table, device))

    @property
    def boundaries(self) -> Tensor:
        """[N + 1] int32: tokens before each document and after the last, what kernels call `cu_seqlens`."""
        return self.table[0, : len(self.lengths) + 1]

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @functools.cached_property
    def first_keys(self) -> Tensor:
        """[T] int32: the first token that each token attends to; T for padding, whose logits nobody wants."""
        before, real = self.table
        num_tokens = sum(self.lengths)
        tokens = torch.arange(num_tokens, device=before.device, dtype=torch.int32)
        # Empty documents begin where the next one does, and are never the last that begins at or before.
        document = torch.searchsorted(before, tokens, right=True) - 1
        is_padding = real[document + 1] == real[document]
        return torch.where(is_padding, num_tokens, before[document])

    @functools.cached_property
    def last_keys(self) -> Tensor:
        """[T] int32: the last token that each token attends to, which is itself."""
        return torch.arange(sum(self.lengths), device=self.table.device, dtype=torch.int32)
