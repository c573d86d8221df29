"""Which ranks hold the placeholders of a step's vision items, from the index alone (context parallelism).

A rank sends features to first stages whose micro-batches it does not read. It finds the ranks in question as
those find themselves (`context.py`): documents are shared by their lengths, and where placeholders are in a
document follows from the lengths of its texts.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from k25_train.data.mix.plan import SequencePlan, StepPlan
from k25_train.data.readable_source import ReadableSource
from parallel.context.plan import ContextPlan, plan_context
from parallel.dep.transfers import RowRun, RowRuns, of_whole_replica, runs_of

CACHED_MICRO_BATCHES = 2**14
"""Whose runs a rank keeps while it plans a step: more than it takes part in."""


def runs_in(
    batch: StepPlan,
    orders: Sequence[Sequence[int]],
    sources: Mapping[str, ReadableSource],
    *,
    micro_batch_size: int,
    seq_len: int,
    cp: int,
) -> RowRuns:
    """Who holds which vision tokens of a global batch; made for the micro-batches that are asked for.

    Args:
        orders: [replica] -> the order in which it takes its micro-batches, by which they are asked for.
        sources: by name.
        micro_batch_size: sequences of a micro-batch.
        seq_len: tokens of a sequence.
        cp: ranks of a first stage that share a micro-batch.
    """
    if cp == 1:
        return of_whole_replica

    @lru_cache(maxsize=CACHED_MICRO_BATCHES)
    def runs(replica: int, turn: int) -> Sequence[RowRun]:
        number = replica * len(orders[replica]) + orders[replica][turn]
        first = number * micro_batch_size
        sequences = [batch.sequence(each) for each in range(first, first + micro_batch_size)]
        plan = plan_context(*documents_of(sequences, seq_len), cp)
        return runs_of(placeholders_of(sequences, sources, seq_len), *_holders(plan, replica * cp))

    return runs


def documents_of(sequences: Sequence[SequencePlan], seq_len: int) -> tuple[list[int], list[int]]:
    """Lengths of the documents of a micro-batch and positions among them of padding, as `MicroBatch` has
    them where all words can be used."""
    lengths: list[int] = []
    padding: list[int] = []
    for sequence in sequences:
        lengths += [piece.length for piece in sequence.pieces]
        if rest := seq_len - sequence.num_tokens:
            padding.append(len(lengths))
            lengths.append(rest)
    return lengths, padding


def placeholders_of(
    sequences: Sequence[SequencePlan], sources: Mapping[str, ReadableSource], seq_len: int
) -> np.ndarray:
    """[V] int64: positions of the placeholders in a micro-batch, ascending."""
    found = [np.zeros(0, dtype=np.int64)]
    for row, sequence in enumerate(sequences):
        position, documents = row * seq_len, sources[sequence.source].documents
        for piece in sequence.pieces:
            # Documents with media are never cut.
            if piece.media:
                found.append(position + documents.placeholders(piece.record, piece.media))
            position += piece.length
    return np.concatenate(found)


def _holders(plan: ContextPlan, first_rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each piece of a micro-batch begins, and the global rank that holds it, in order of tokens."""
    before = np.concatenate([[0], np.cumsum(plan.document_lengths)])
    pieces = sorted((*piece[:2], rank) for rank, own in enumerate(plan.pieces) for piece in own)
    documents, starts, ranks = np.array(pieces, dtype=np.int64).reshape(-1, 3).T
    return before[documents] + starts, first_rank + ranks
