"""How long an engine generates for one client."""

import time
from collections.abc import Sequence


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


class UseClock:
    """Adds up what an engine says of itself each time that it is asked (`EngineState.busy_share`)."""

    def __init__(self) -> None:
        self._asked_at = time.monotonic()
        self.busy_s = self.total_s = 0.0

    def note(self, busy_share: float) -> None:
        """It generated for that share of the time since it was asked last."""
        now = time.monotonic()
        elapsed_s, self._asked_at = now - self._asked_at, now
        self.busy_s += busy_share * elapsed_s
        self.total_s += elapsed_s


def busy_share(clocks: Sequence[UseClock]) -> float:
    """Share of the time that several engines generated since this was asked last; 0 where none was asked."""
    busy_s, total_s = (sum(getattr(clock, name) for clock in clocks) for name in ("busy_s", "total_s"))
    for clock in clocks:
        clock.busy_s = clock.total_s = 0.0
    return float(busy_s / total_s) if total_s > 0 else 0.0
