"""The phases of this rank: what it is doing, since when, and with which ranks.

Code that does work says so: `with tracker.phase("forward"):`. Entering and leaving a phase costs about a
microsecond, so each call that communicates is a phase. Another thread may ask for the state at any time.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from parallel.watchdog.recorder import Recorder
from parallel.watchdog.states import RankState

Peers = Sequence[int] | Callable[[], Sequence[int]]
"""Global ranks that a phase communicates with, or a function that finds them when the state is asked for."""


class Phase:
    """One piece of work in progress; a context manager that is entered once."""

    __slots__ = ("_tracker", "may_be_long", "name", "peers")

    def __init__(self, tracker: "PhaseTracker", name: str, peers: Peers, may_be_long: bool) -> None:
        self._tracker = tracker
        self.name = name
        self.peers = peers
        self.may_be_long = may_be_long

    def __enter__(self) -> None:
        tracker = self._tracker
        tracker._phases.append(self)
        tracker._changed = tracker._clock()
        if tracker.recorder is not None:
            tracker.recorder.begin(self, tracker._changed, len(tracker._phases) - 1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tracker = self._tracker
        if self.peers:
            tracker._last_communication = self
        # With overlapped forward and backward, a phase may end before one that began after it.
        if tracker._phases[-1] is self:
            tracker._phases.pop()
        else:
            tracker._phases.remove(self)
        tracker._changed = tracker._clock()
        if tracker.recorder is not None:
            tracker.recorder.end(self, tracker._changed)

    def ranks(self) -> tuple[int, ...]:
        """The ranks that it communicates with, sorted, without this one."""
        ranks = self.peers() if callable(self.peers) else self.peers
        return tuple(sorted(set(ranks) - {self._tracker.rank}))


class PhaseTracker:
    """What this rank is doing.

    Time counts while communicators are set up and from the first step on, and inside phases only: the rest
    of start-up and the first evaluation have the limits of torchrun's rendezvous and of the process group. It
    does not count in a phase that may be long.
    """

    def __init__(self, rank: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns seconds since any fixed origin."""
        self.rank = rank
        self.recorder: Recorder | None = None
        """Recorder of phases that begin and end from now on; None records nothing."""
        self._clock = clock
        self._phases: list[Phase] = []
        self._changed = clock()
        self._step = 0
        self._is_setting_up = False
        self._last_communication: Phase | None = None

    def phase(self, name: str, peers: Peers = (), *, may_be_long: bool = False) -> Phase:
        """A phase for the length of a `with` block.

        `peers` are the ranks that it communicates with, and may include this one. `may_be_long` exempts it
        from the time limit, here and on the ranks that wait for this one meanwhile.
        """
        return Phase(self, name, peers, may_be_long)

    @contextmanager
    def setting_up(self) -> Iterator[None]:
        """Within: the ranks connect; time counts."""
        self._is_setting_up = True
        try:
            with self.phase("set up"):
                yield
        finally:
            self._is_setting_up = False

    def training(self, step: int) -> Phase:
        """The phase of training step `step` (from 1); time counts from the first such call."""
        self._step = step
        return self.phase("train")

    def seconds_without_progress(self) -> float:
        """Time since a phase began or ended; 0 where time does not count."""
        phases = tuple(self._phases)
        counts = self._step or self._is_setting_up
        if not counts or not phases or any(phase.may_be_long for phase in phases):
            return 0.0
        return self._clock() - self._changed

    def state(self, *, device_is_busy: bool = False) -> RankState:
        """What this rank is doing now.

        On a GPU the host only submits communication. If no phase communicates and the device has work left,
        the host waits for the device, most likely for the last communication.
        """
        phases = tuple(self._phases)
        names = [phase.name for phase in phases]
        waits_for = next((ranks for phase in reversed(phases) if (ranks := phase.ranks())), ())
        last = self._last_communication
        if not waits_for and device_is_busy and last is not None:
            names.append(f"device, {last.name} or later")
            waits_for = last.ranks()
        return RankState(
            rank=self.rank,
            step=self._step,
            phases=tuple(names),
            seconds=self._clock() - self._changed,
            waits_for=waits_for,
            may_be_long=any(phase.may_be_long for phase in phases),
        )
