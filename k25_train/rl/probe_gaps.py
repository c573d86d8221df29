"""Whether an engine's log-probabilities of the probe are the trainer's, sequence by sequence. Pure; numpy
only.

Shapes: S sequences, n tokens of all of them, one after another, without the first of each.
"""

from collections.abc import Sequence

import numpy as np

FLIPS = 1
"""Sequences, of three or more, in which an engine may be further from the trainer. Where two experts are
equally good for a token, to the last bits, engine and trainer may choose different ones, and differ from
there on: with small models about once in fifty pushes. Our choice."""
NEARER = 2.0
"""How many times nearer to the weights of the push before an engine is that has them still. Our choice."""


def gaps_of(logprobs: Sequence[np.ndarray], own: np.ndarray) -> np.ndarray:
    """[n] float64 nats: distance of an engine's log-probabilities from the trainer's; infinite where there is
    none.

    Args:
        logprobs: of each sequence.
        own: [n] float64, the trainer's; infinite where it has none.
    """
    joined = np.concatenate([np.zeros(0), *logprobs]).astype(np.float64)
    if len(joined) != len(own):
        return np.full(max(len(own), 1), np.inf)
    return np.where(np.isfinite(joined), np.abs(joined - own), np.inf)


def apart(gaps: np.ndarray, before: np.ndarray, lengths: Sequence[int], tolerance: float) -> np.ndarray:
    """[S] bool: whether an engine has other weights, by each sequence alone; all where tokens are missing.

    A step may change less than the tolerance allows. So a sequence counts as well if it is nearer to what the
    trainer had at the push before: an engine that missed one.

    Args:
        gaps: [n] float64, `gaps_of` the trainer now.
        before: [n] float64, `gaps_of` the trainer at the push before; infinite if there was none.
        lengths: S numbers of tokens.
        tolerance: nats of any token.
    """
    if len(gaps) != sum(lengths):
        return np.ones(len(lengths), dtype=np.bool_)
    behind = np.cumsum(lengths)[:-1]
    pairs = zip(np.split(gaps, behind), np.split(before, behind), strict=True)
    return np.array(
        [not now.max(initial=0.0) <= tolerance or NEARER * old.sum() < now.sum() for now, old in pairs]
    )


def is_flip(apart: np.ndarray, have_images: Sequence[bool]) -> bool:
    """Whether the sequences that are apart, if any, may be those of a tie of a router (`FLIPS`).

    Wrong weights show in every sequence that they take part in; those of the vision tower take part in
    sequences with images alone. So another one that all the same weights take part in has to agree.

    Args:
        apart: [S] bool.
        have_images: whether each sequence has images.
    """
    if not apart.any():
        return True
    if apart.sum() > FLIPS or len(apart) < 3:
        return False
    as_many = np.array(have_images) >= have_images[int(np.argmax(apart))]
    return bool((as_many & ~apart).any())
