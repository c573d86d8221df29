"""Processes that plan candidates; torch-free, so that they start in half a second."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from k25_train.plan.search.best_first import Workers

MOST_WORKERS = 8
"""A login node is shared."""

_work: Callable[[Any], Any]
"""What a worker's process does with an item."""


class InProcess:
    """Does everything itself, at once."""

    num_at_a_time = 1

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work

    def submit(self, what: Any) -> "Future[Any]":
        """Do it."""
        future: Future[Any] = Future()
        future.set_result(self._work(what))
        return future


class Processes:
    """Hands everything to processes."""

    def __init__(self, pool: ProcessPoolExecutor, num_workers: int) -> None:
        self._pool = pool
        self.num_at_a_time = 2 * num_workers

    def submit(self, what: Any) -> "Future[Any]":
        """Have it done."""
        return self._pool.submit(_do, what)


@contextmanager
def started(work: Callable[[Any], Any], num_workers: int | None = None) -> Iterator[Workers]:
    """Workers that do `work`, which has to be picklable if there is more than one.

    Args:
        work: from an item to its answer.
        num_workers: processes; as many as this one may have cores, `MOST_WORKERS` at most, if None.
    """
    number = min(MOST_WORKERS, len(os.sched_getaffinity(0))) if num_workers is None else num_workers
    if number <= 1:
        yield InProcess(work)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(number, context, initializer=_begin, initargs=(work,)) as pool:
        try:
            yield Processes(pool, number)
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work


def _do(what: Any) -> Any:
    return _work(what)
