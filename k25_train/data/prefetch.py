"""Results made ahead of time in a background thread."""

from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor


class Prefetch[Key: Hashable, Result]:
    """Makes what will be asked for next while the caller works; one thread, in the order asked for."""

    def __init__(self, make: Callable[[Key], Result]) -> None:
        self._make = make
        self._executor: ThreadPoolExecutor | None = None
        self._pending: dict[Key, Future[Result]] = {}

    def get(self, key: Key, then: Iterable[Key]) -> Result:
        """The result of `key`; those of `then` are made in the background, others under way are dropped.

        What goes wrong in the background is raised when its key is asked for.
        """
        ready = self._pending.pop(key, None)
        wanted = list(then)
        for stale in self._pending.keys() - set(wanted):
            self._pending.pop(stale).cancel()
        for next_key in wanted:
            if next_key not in self._pending:
                self._pending[next_key] = self._thread().submit(self._make, next_key)
        return ready.result() if ready is not None else self._make(key)

    def close(self) -> None:
        """End the thread; what is under way is finished and dropped."""
        self._pending.clear()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def _thread(self) -> ThreadPoolExecutor:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        return self._executor
