"""Work on files in a thread of its own, which training neither waits for nor ends with."""

import threading
from collections.abc import Callable


class Background[T]:
    """A function that runs in a thread.

    The thread does not keep the process alive: a run that ends by an error leaves what a crash would.
    """

    def __init__(self, name: str, action: Callable[[], T]) -> None:
        """Start it. `name` is the thread's."""
        self._action = action
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether it has returned or raised."""
        return not self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether it has raised."""
        return self._error is not None

    def result(self) -> T:
        """What it returned, or raise what it raised; waits for its end."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._action())
        except BaseException as error:
            self._error = error
