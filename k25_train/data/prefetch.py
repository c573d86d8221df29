"""What the next steps compute on, made ready ahead of time in a background thread."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class StepPrefetch[Result]:
    """Makes the results of the next steps while the caller works on one; one thread, step after step."""

    def __init__(self, make: Callable[[int], Result], num_ahead: int, num_steps: int) -> None:
        """Start nothing yet: the first `get` does.

        Args:
            make: step, counted from 0 -> its result.
            num_ahead: steps made ahead of the one asked for; 0 makes each when it is asked for, without a
                thread.
            num_steps: steps of the run; none from there on is made ahead.
        """
        self._make = make
        self._num_ahead = num_ahead
        self._num_steps = num_steps
        self._executor: ThreadPoolExecutor | None = None
        self._pending: dict[int, Future[Result]] = {}

    def get(self, step: int) -> Result:
        """The result of `step`; those of the next steps are made in the background, any others are dropped.

        An error in the background is raised when its step is asked for.
        """
        ready = self._pending.pop(step, None)
        if ready is None and self._num_ahead:
            # In the thread, too, and before those ahead: a plan follows from the one before.
            ready = self._thread().submit(self._make, step)
        ahead = range(step + 1, min(step + 1 + self._num_ahead, self._num_steps))
        for stale in self._pending.keys() - set(ahead):
            self._pending.pop(stale).cancel()
        for next_step in ahead:
            if next_step not in self._pending:
                self._pending[next_step] = self._thread().submit(self._make, next_step)
        return ready.result() if ready is not None else self._make(step)

    def close(self) -> None:
        """End the thread; a result in the making is finished and dropped."""
        self._pending.clear()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def _thread(self) -> ThreadPoolExecutor:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        return self._executor
