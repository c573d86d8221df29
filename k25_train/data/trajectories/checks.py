"""What is wrong with trajectories before they are written: a step trains on a file as it is.

A log-probability that is no number would make every weight of the model NaN, long after whoever gave it.
"""

import numpy as np

from k25_train.data.trajectories.rows import Trajectories
from k25_train.errors import DataError

HIGHEST_LOGPROB = 1e-3
"""A probability may be rounded to a little more than 1. Our choice."""


def check_trajectories(rows: Trajectories) -> None:
    """Raise `DataError`, naming the first trajectory that is wrong, what is, and where."""
    if not len(rows.names):
        raise DataError("a step has no trajectories: at least one group has to be complete before it trains")
    _check_sizes(rows)
    drawn = rows.generated
    starts = rows.offsets[:-1]
    _refuse(rows, rows.tokens < 0, "has a negative token id", rows.tokens)
    is_first = np.zeros(len(drawn), dtype=np.bool_)
    is_first[starts] = True
    _refuse(rows, is_first & drawn, "was generated from its first token on: it needs a prompt", rows.tokens)
    logprobs = rows.rollout_logprobs
    _refuse(
        rows,
        drawn & ~np.isfinite(logprobs),
        "has a log-probability of its rollout that is no finite number",
        logprobs,
    )
    _refuse(
        rows, drawn & (logprobs > HIGHEST_LOGPROB), "has a log-probability of its rollout above 0", logprobs
    )
    _refuse(rows, drawn & (rows.versions < 0), "has a token of no version of the weights", rows.versions)
    _refuse(rows, ~np.isfinite(rows.advantages), "has an advantage that is no finite number", rows.advantages)
    for name in ("policy_weights", "ratio_weights"):
        values = getattr(rows, name)
        _refuse(rows, ~np.isfinite(values) | (values < 0), f"has {name} that are not 0 or more", values)
        _refuse(rows, ~drawn & (values != 0), f"has {name} where nothing was generated", values)


def _check_sizes(rows: Trajectories) -> None:
    """Raise `DataError` unless every array is as long as it has to be."""
    num_tokens, lengths = int(rows.offsets[-1]), rows.lengths
    for name in (
        "tokens", "generated", "rollout_logprobs", "versions", "advantages", "policy_weights",
        "ratio_weights",
    ):  # fmt: skip
        found = len(getattr(rows, name))
        if found != num_tokens:
            raise DataError(f"{name} has {found} entries for the {num_tokens} tokens of all trajectories")
    empty = np.flatnonzero(lengths <= 0)
    if len(empty):
        raise DataError(f"trajectory {rows.names[empty[0]]} has no tokens")


def _refuse(rows: Trajectories, is_wrong: np.ndarray, what: str, values: np.ndarray) -> None:
    """Raise `DataError` for the first token [T] that is wrong."""
    found = np.flatnonzero(is_wrong)
    if not len(found):
        return
    token = int(found[0])
    number = int(np.searchsorted(rows.offsets, token, side="right")) - 1
    position = token - int(rows.offsets[number])
    more = f", and {len(found) - 1} tokens more of the step" if len(found) > 1 else ""
    raise DataError(
        f"trajectory {rows.names[number]} {what}: {values[token]} at token {position} of "
        f"{rows.lengths[number]}{more}"
    )
