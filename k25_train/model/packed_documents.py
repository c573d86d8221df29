"""The documents of one micro-batch, or of a rank's share of one, as megatron-core passes them to layers.

Shapes: T tokens that the layers see: of a micro-batch, or with context parallelism those of the rank.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from k25_train.model.documents import DocumentBounds
from parallel.context.blocks import ContextShard
from parallel.context.plan import ContextPlan
from parallel.host.upload import upload


def _no_tokens() -> Tensor:
    return torch.empty(0, dtype=torch.long)


@dataclass
class PackedDocuments(PackedSeqParams):
    """The documents of one micro-batch, as megatron-core passes them from layer to layer.

    The base class's fields are filled in addition to ours, for megatron-core's own readers.
    """

    bounds: DocumentBounds = field(default_factory=lambda: DocumentBounds.of((), torch.device("cpu")))
    """Where documents begin and end; with context parallelism, the rank's pieces of them."""
    is_padding: Tensor = field(default_factory=lambda: torch.zeros(0, 1, dtype=torch.bool))
    """Which tokens are padding, [T, 1] bool."""
    positions: Tensor = field(default_factory=_no_tokens)
    """Position of each token inside its document, [T] int64."""
    places: Tensor = field(default_factory=_no_tokens)
    """Where each token is in the micro-batch, [T] int64, ascending; divided by a sequence's tokens, in which
    sequence."""
    shard: ContextShard = field(default_factory=ContextShard.none)
    """Which pieces the rank has, and what they attend to; without context parallelism there is nothing."""
    sequences: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """What `tokens_of_sequences` has found: every layer asks for it."""
    rotations: Tensor | None = None
    """Rotations of the rotary pairs, [T, 1, R/2] complex64; set by the first layer that needs them."""

    @classmethod
    def of(
        cls, lengths: Sequence[int], device: torch.device, padding: Collection[int] = ()
    ) -> "PackedDocuments":
        """Documents of these lengths, one after another without gaps; those at `padding` are padding."""
        return cls._of_parts([(0, length) for length in lengths], device, padding)

    @classmethod
    def of_shard(cls, plan: ContextPlan, rank: int, device: torch.device) -> "PackedDocuments":
        """What a rank has of a micro-batch. `rank` is its place among those that share it."""
        pieces = plan.pieces[rank]
        padding = {number for number, piece in enumerate(pieces) if piece.document in plan.padding}
        documents = cls._of_parts([(piece.start, piece.stop) for piece in pieces], device, padding)
        documents.places = upload(torch.from_numpy(plan.positions(rank)), device)
        documents.shard = ContextShard(plan, rank, device)
        return documents

    @classmethod
    def _of_parts(
        cls, parts: Sequence[tuple[int, int]], device: torch.device, padding: Collection[int]
    ) -> "PackedDocuments":
        """Parts of documents, from a token of the document to another."""
        bounds = DocumentBounds.of([stop - start for start, stop in parts], device, padding)
        positions = torch.cat([torch.arange(start, stop) for start, stop in parts])
        is_padding = torch.cat([
            torch.full((stop - start, 1), number in padding) for number, (start, stop) in enumerate(parts)
        ])  # fmt: skip
        longest = max(stop for _, stop in parts)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=bounds.boundaries,
            cu_seqlens_kv=bounds.boundaries,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            bounds=bounds,
            is_padding=upload(is_padding, device),
            positions=upload(positions, device),
            places=torch.arange(len(positions), device=device),
        )

    def tokens_of_sequences(self, sequence_tokens: int) -> tuple[int, ...]:
        """Tokens here of each of the sequences, of `sequence_tokens` each, that make up the micro-batch, one
        sequence after another. Without context parallelism nothing: all sequences are whole."""
        if sequence_tokens not in self.sequences:
            found = self.shard.plan.tokens_of_sequences(self.shard.rank, sequence_tokens)
            self.sequences[sequence_tokens] = found
        return self.sequences[sequence_tokens]

    @property
    def num_padding(self) -> int:
        """Tokens that are padding."""
        return sum(self.bounds.lengths[position] for position in self.bounds.padding)
