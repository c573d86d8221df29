"""How long an engine generates for one client."""

import time


class BusyClock:
    """Measures the share of time in which at least one request was on the way and the engine not paused."""

    def __init__(self) -> None:
        self._num_running = 0
        self._is_paused = False
        self._busy_s = 0.0
        self._since = self._asked = time.monotonic()

    def start(self) -> None:
        """A request is sent."""
        self._add()
        self._num_running += 1

    def stop(self) -> None:
        """It has come back."""
        self._add()
        self._num_running -= 1

    def pause(self) -> None:
        """The engine stops."""
        self._add()
        self._is_paused = True

    def resume(self) -> None:
        """It goes on."""
        self._add()
        self._is_paused = False

    def share(self) -> float:
        """Share since this was last asked, 0 to 1."""
        self._add()
        elapsed, busy = self._since - self._asked, self._busy_s
        self._asked, self._busy_s = self._since, 0.0
        return min(1.0, busy / elapsed) if elapsed > 0 else 0.0

    def _add(self) -> None:
        now = time.monotonic()
        if self._num_running and not self._is_paused:
            self._busy_s += now - self._since
        self._since = now
