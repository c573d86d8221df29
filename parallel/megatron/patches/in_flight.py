"""Communication that is in flight, with a context around waiting for it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


class WorkInFlight:
    """A proxy of `torch.distributed.Work`."""

    __slots__ = ("_around_wait", "_work")

    def __init__(self, work: Any, around_wait: Callable[[], AbstractContextManager[Any]]) -> None:
        """`around_wait` returns a new context for each call of `wait`."""
        self._work = work
        self._around_wait = around_wait

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """Wait as `torch.distributed.Work.wait` does, within the context."""
        with self._around_wait():
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
