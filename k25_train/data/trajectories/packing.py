"""Documents of a step to sequences, sequences to micro-batches of replicas. Pure: arrays in, arrays out.

The same on every rank, from lengths alone. A step has as many sequences as its trajectories fill; what the
layout needs more of are sequences of padding alone.

    trajectories   |--a--| |-b-| |---c---| |d|        never cut
                        pack_whole, the longest that fits
    sequences      [c d .] [a b .] [. . .]            the last one fills the micro-batches of replicas
                        by descending tokens, back and forth
    replicas       0: [c d .] ...   1: [a b .] ...    the same number of sequences each
"""

from collections.abc import Sequence

import numpy as np

from k25_train.data.mix.packing import pack_whole
from k25_train.data.mix.ragged import offsets_of, positions_of
from k25_train.data.mix.sequences import Sequences
from k25_train.errors import DataError

KEY = 0
"""Of `pack_whole`, which draws: the same packing whatever the run's seed."""


def packed(lengths: np.ndarray, names: Sequence[str], grids: Sequence[np.ndarray], seq_len: int) -> Sequences:
    """All trajectories in sequences, each item of which is the number of a trajectory.

    Args:
        lengths: [R] int64, tokens of each.
        names: [R], for messages.
        grids: [R], each [I, 3] int32: the vision items of each.
        seq_len: tokens of a sequence.

    Raises `DataError` for a trajectory that is longer than a sequence.
    """
    longest = int(lengths.argmax())
    if lengths[longest] > seq_len:
        raise DataError(
            f"trajectory {names[longest]} has {lengths[longest]} tokens and is not cut, train.seq_len is "
            f"{seq_len}: raise it, or lower rollout.max_tokens"
        )
    found = pack_whole(lengths, seq_len, KEY)
    counts = np.array([len(grid) for grid in grids], dtype=np.int64)
    vision = offsets_of(counts)
    places = positions_of(vision[:-1][found.documents], counts[found.documents])
    return Sequences(
        items=found.documents,
        starts=found.starts,
        lengths=found.lengths,
        offsets=found.offsets,
        vision_offsets=offsets_of(counts[found.documents]),
        grids=np.concatenate([np.zeros((0, 3), dtype=np.int32), *grids])[places],
        epochs=np.zeros(len(found.documents), dtype=np.int32),
    )


def with_padding(sequences: Sequences, num_sequences: int) -> Sequences:
    """The same with sequences without documents behind them, up to a number."""
    more = num_sequences - (len(sequences.offsets) - 1)
    padded = np.concatenate([sequences.offsets, np.full(more, sequences.offsets[-1])])
    return Sequences(
        sequences.items,
        sequences.starts,
        sequences.lengths,
        padded,
        sequences.vision_offsets,
        sequences.grids,
        sequences.epochs,
    )


def num_padded(num_sequences: int, dp: int, micro_batch_size: int, fewest: int) -> int:
    """The fewest sequences, not below a number, that are whole micro-batches of all replicas, at least
    `fewest` on each."""
    unit = dp * micro_batch_size
    return max(-(-num_sequences // unit), fewest) * unit


def dealt(num_tokens: np.ndarray, dp: int) -> np.ndarray:
    """[S] int64: the order of sequences in which each of `dp` replicas takes a contiguous share.

    The longest sequences go to the replicas in turn, there and back, so that all get the same number and
    about as many tokens; those of padding alone, to whom they fall. `num_tokens` [S] is without padding.
    """
    order = np.argsort(-num_tokens, kind="stable").reshape(-1, dp)
    order[1::2] = order[1::2, ::-1].copy()
    return order.T.reshape(-1)
