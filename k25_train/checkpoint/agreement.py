"""Work on files that all ranks agree on: what fails on one fails on all, with its cause, and none waits."""

import errno
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from k25_train.errors import CheckpointError, K25Error

OF_ONE_NODE = ("EIO", "EROFS", "ESTALE", "ENODEV", "ENOTCONN", "EREMOTEIO")
"""Errors of a file system that may be those of the node on which they happen; others have them all."""
_MAX_TOLD = 3
"""Ranks whose causes an error tells; the others are counted."""


def on_first_rank[T](action: Callable[[], T]) -> T:
    """Do something to files on rank 0 alone; every rank gets its result, or raises its error."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (OSError, K25Error) as error:
            outcome[1] = error
            if isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in OF_ONE_NODE:
                # Sent along with it: the others raise what happened here.
                error.of_ranks = (0,)  # type: ignore[attr-defined]
        except Exception as error:
            # Not expected, and perhaps not to be sent; the others must not wait for it all the same.
            outcome[1] = CheckpointError(f"rank 0: {type(error).__name__}: {error}")
            outcome[1].__cause__ = error
    dist.broadcast_object_list(outcome)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result


def on_every_rank[T](action: Callable[[], T]) -> list[T]:
    """Do something on every rank; rank 0 gets all results in the order of ranks, the others none.

    Raises `CheckpointError` with the causes on every rank if it raised on any.
    """
    results = gather_from_ranks(action)
    return results if dist.get_rank() == 0 else []


def gather_from_ranks[T](action: Callable[[], T]) -> list[T]:
    """Do something on every rank; every rank gets all results in the order of ranks.

    Raises `CheckpointError` with the causes on every rank if it raised on any.
    """
    mine: tuple[Any, str, str]
    try:
        mine = action(), "", ""
    except Exception as error:
        text = str(error) if isinstance(error, (OSError, K25Error)) else f"{type(error).__name__}: {error}"
        code = errno.errorcode.get(error.errno or 0, "") if isinstance(error, OSError) else ""
        mine = None, text or type(error).__name__, code
    by_rank: list[Any] = [None] * dist.get_world_size()
    # Not gathered on rank 0 alone: for that NCCL connects it to each of thousands of others.
    dist.all_gather_object(by_rank, mine)
    failure = on_first_rank(lambda: _failure([(text, code) for _, text, code in by_rank]))
    if failure is not None:
        raise failure
    return [result for result, _, _ in by_rank]


def _failure(by_rank: Sequence[tuple[str, str]]) -> CheckpointError | None:
    """The error of all ranks, by the text and the system's error of each; None if all texts are empty."""
    failed = {rank: (text, code) for rank, (text, code) in enumerate(by_rank) if text}
    if not failed:
        return None
    causes = [f"rank {rank}: {text}" for rank, (text, _) in failed.items()]
    told, more = causes[:_MAX_TOLD], len(causes) - _MAX_TOLD
    failure = CheckpointError("; ".join([*told, f"and {more} more ranks"] if more > 0 else told))
    failure.of_ranks = tuple(failed)
    failure.code = next((code for _, code in failed.values() if code), "")
    return failure
