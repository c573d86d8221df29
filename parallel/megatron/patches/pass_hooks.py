"""Work between the passes of megatron-core's schedules, where a rank is about to wait.

What is done there costs nothing as long as the rank would have waited: the last pass's output is already on
its way, and the next pass's input is received meanwhile. The schedules have no hook at that place, so their
passes and their exchange with neighbouring stages are wrapped: whatever waits for a neighbour, or starts a
pass, first calls the functions given to `pass_hooks`. Without one they are called as they are.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_is_installed = False
_work: Sequence[Callable[[int], None]] = ()
_num_passes = 0


@contextmanager
def pass_hooks(work: Sequence[Callable[[int], None]]) -> Iterator[None]:
    """While a schedule runs, call each of `work` with the number of passes that this rank has done.

    They are called at least once for each number before that pass waits for its input, and in the end before
    gradients are reduced; often several times with the same number. Passes that run beside each other count
    when both are done.
    """
    global _work, _num_passes
    _work, _num_passes = work, 0
    try:
        yield
    finally:
        _work = ()


def install() -> None:
    """Wrap what megatron-core's schedules call. Idempotent; imports megatron-core."""
    global _is_installed
    if _is_installed:
        return
    _is_installed = True
    from megatron.core.pipeline_parallel import combined_1f1b, p2p_communication, schedules

    schedules.forward_step = _counted(schedules.forward_step)
    schedules.backward_step = _counted(schedules.backward_step)
    combined = combined_1f1b.combined_forward_backward_step
    combined_1f1b.combined_forward_backward_step = _counted(combined, _num_combined)
    for name in ("_p2p_ops", "_batched_p2p_ops"):
        setattr(p2p_communication, name, _with_waiting_handles(getattr(p2p_communication, name)))


def working_before[**Arguments, Result](function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function`, which comes after the passes, with the work that is left before it."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        _do_work()
        return function(*args, **kwargs)

    return call


def _do_work() -> None:
    for work in _work:
        work(_num_passes)


def _counted(
    run: Callable[..., Any], count: Callable[..., int] = lambda *args, **kwargs: 1
) -> Callable[..., Any]:
    """A function that runs as many passes as `count` finds in its arguments."""

    @functools.wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        global _num_passes
        _do_work()
        result = run(*args, **kwargs)
        _num_passes += count(*args, **kwargs)
        return result

    return call


def _num_combined(*args: Any, **_: Any) -> int:
    """Passes of `combined_forward_backward_step`: it gets a model chunk for each, or None."""
    f_model, b_model = args[2], args[6]
    return (f_model is not None) + (b_model is not None)


def _with_waiting_handles(start_exchange: Callable[..., Any]) -> Callable[..., Any]:
    """megatron-core's exchange with neighbouring stages: whoever waits for it does work first."""

    @functools.wraps(start_exchange)
    def call(**kwargs: Any) -> Any:
        works = start_exchange(**kwargs)
        if isinstance(works, dict):
            return {end: _WorkedBefore(work) for end, work in works.items()}
        return [_WorkedBefore(work) for work in works]

    return call


class _WorkedBefore:
    """Communication under way."""

    __slots__ = ("_communication",)

    def __init__(self, communication: Any) -> None:
        self._communication = communication

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """Wait for it, as `torch.distributed.Work.wait`, when the work that may be done now is done."""
        _do_work()
        return self._communication.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._communication, name)
