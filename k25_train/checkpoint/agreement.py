"""Work on files that all ranks agree on: what fails on one fails on all, with its cause, and none waits."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from k25_train.errors import CheckpointError, K25Error

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
    mine: tuple[Any, str]
    try:
        mine = action(), ""
    except Exception as error:
        text = str(error) if isinstance(error, (OSError, K25Error)) else f"{type(error).__name__}: {error}"
        mine = None, text or type(error).__name__
    by_rank: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, by_rank)
    failure = on_first_rank(lambda: _causes([text for _, text in by_rank or []]))
    if failure:
        raise CheckpointError(failure)
    return [result for result, _ in by_rank or []]


def _causes(by_rank: Sequence[str]) -> str:
    causes = [f"rank {rank}: {text}" for rank, text in enumerate(by_rank) if text]
    told, more = causes[:_MAX_TOLD], len(causes) - _MAX_TOLD
    return "; ".join([*told, f"and {more} more ranks"] if more > 0 else told)
