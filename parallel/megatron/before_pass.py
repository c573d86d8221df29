"""Work between the passes of a pipeline schedule, where a rank is about to wait.

It costs nothing as long as the rank would have waited: the last pass's output is already on its way, and the
next pass's input is received meanwhile.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from parallel.megatron.patches.pass_hooks import Passes, PassHooks

BeforePass = Callable[[int], None]
"""Does work before a pass, given the number of passes that this rank has completed in this schedule."""


class WorkBeforePasses(PassHooks):
    """Calls functions before passes; a new one is made for each run of a schedule.

    For each number of completed passes, they are called at least once before the next pass waits for its
    input, and often several times; after the last pass, before gradients are reduced. Overlapped passes are
    counted when both are complete.
    """

    def __init__(self, before_pass: Sequence[BeforePass]) -> None:
        self._before_pass = before_pass
        self._num_passes = 0

    @contextmanager
    def around_pass(self, passes: Passes) -> Iterator[None]:
        """Work first; count the passes once they have completed."""
        self._work()
        yield
        # Not reached if the pass fails.
        self._num_passes += passes.num_passes

    @contextmanager
    def around_wait(self, direction: str, peers: tuple[int, ...]) -> Iterator[None]:
        """Work before waiting for a neighbouring stage."""
        self._work()
        yield

    @contextmanager
    def around_finalize(self) -> Iterator[None]:
        """Do the rest of the work."""
        self._work()
        yield

    def _work(self) -> None:
        for before_pass in self._before_pass:
            before_pass(self._num_passes)
