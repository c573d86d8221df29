"""Hooks around the passes of megatron-core's pipeline schedules and their exchanges with neighbouring stages.

The schedules have no hooks there, so the five functions that they call are wrapped here, each once. Whoever
wants to know of passes, or to do something between them, subscribes with a `PassHooks`.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from enum import Enum
from functools import partial
from typing import Any, Literal

from parallel.megatron.patches.in_flight import WorkInFlight

Direction = Literal["send", "recv", "send/recv"]
"""Which way an exchange with a neighbouring stage goes; the last is for a handle that may be of either."""

_NOTHING = nullcontext()
_NEIGHBOURS = {
    "tensor_send_prev": "prev_pipeline_rank",
    "tensor_recv_prev": "prev_pipeline_rank",
    "tensor_send_next": "next_pipeline_rank",
    "tensor_recv_next": "next_pipeline_rank",
}
"""Tensor argument of megatron-core's exchange -> the argument that names its peer."""


class Passes(Enum):
    """What one call of the schedule runs."""

    forward = "forward"
    backward = "backward"
    both = "forward and backward"
    """Of two micro-batches, overlapped."""

    @property
    def num_passes(self) -> int:
        """The number of passes in the call."""
        return 2 if self is Passes.both else 1


class PassHooks:
    """A subscriber: override what is of interest; each method's context is entered around one event.

    Contexts of the last subscriber are entered first and left last. One that raises ends the step.
    """

    def around_pass(self, passes: Passes) -> AbstractContextManager[Any]:
        """Around a pass of one micro-batch through one chunk, or two overlapped passes."""
        return _NOTHING

    def around_exchange(self, peers: tuple[int, ...]) -> AbstractContextManager[Any]:
        """Around starting sends to and receives from neighbouring stages, `peers` by global rank."""
        return _NOTHING

    def around_wait(self, direction: Direction, peers: tuple[int, ...]) -> AbstractContextManager[Any]:
        """Around waiting for a send or receive that was started earlier."""
        return _NOTHING

    def around_finalize(self) -> AbstractContextManager[Any]:
        """Around reducing the gradients of a step, after its last pass (`hooked_finalize`)."""
        return _NOTHING


_subscribers: list[PassHooks] = []
_is_installed = False


def subscribe(hooks: PassHooks) -> None:
    """Call `hooks` from now on, outside of those that have subscribed before."""
    _subscribers.append(hooks)


@contextmanager
def subscribed(hooks: PassHooks) -> Iterator[None]:
    """Within: `hooks` are called, outside of those that have subscribed before."""
    subscribe(hooks)
    try:
        yield
    finally:
        _subscribers.remove(hooks)


def install() -> None:
    """Wrap what megatron-core's schedules call. Idempotent; imports megatron-core."""
    global _is_installed
    if _is_installed:
        return
    _is_installed = True
    from megatron.core.pipeline_parallel import combined_1f1b, p2p_communication, schedules

    schedules.forward_step = hooked_pass(schedules.forward_step, Passes.forward)
    schedules.backward_step = hooked_pass(schedules.backward_step, Passes.backward)
    combined = hooked_combined(combined_1f1b.combined_forward_backward_step)
    combined_1f1b.combined_forward_backward_step = combined
    for name in ("_p2p_ops", "_batched_p2p_ops"):
        setattr(p2p_communication, name, hooked_exchange(getattr(p2p_communication, name)))


def hooked_pass(run: Callable[..., Any], passes: Passes) -> Callable[..., Any]:
    """A function that always runs `passes`, within the hooks around them."""

    @functools.wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _around(lambda hooks: hooks.around_pass(passes)):
            return run(*args, **kwargs)

    return call


def hooked_combined(combined: Callable[..., Any]) -> Callable[..., Any]:
    """megatron-core's overlapped step; in warm-up and cool-down it is called for one pass alone."""
    f_model, b_model = argument_of(combined, "f_model"), argument_of(combined, "b_model")
    runs = {passes: hooked_pass(combined, passes) for passes in Passes}

    @functools.wraps(combined)
    def call(*args: Any, **kwargs: Any) -> Any:
        if b_model(args, kwargs) is None:
            passes = Passes.forward
        elif f_model(args, kwargs) is None:
            passes = Passes.backward
        else:
            passes = Passes.both
        return runs[passes](*args, **kwargs)

    return call


def hooked_exchange(start: Callable[..., Any]) -> Callable[..., Any]:
    """megatron-core's exchange with neighbouring stages; waiting for its handles is hooked, too."""

    @functools.wraps(start)
    def call(**kwargs: Any) -> Any:
        # 1. The neighbours of the tensors that there are.
        ends = {end: kwargs[rank] for end, rank in _NEIGHBOURS.items() if kwargs[end] is not None}
        peers = tuple(ends.values())
        with _around(lambda hooks: hooks.around_exchange(peers)):
            works = start(**kwargs)
        # 2. Handles of `_p2p_ops` are named after their tensor; those of `_batched_p2p_ops` may be for any.
        if not isinstance(works, dict):
            return [WorkInFlight(work, partial(_around_wait, "send/recv", peers)) for work in works]
        return {end: _end_in_flight(work, end, ends[f"tensor_{end}"]) for end, work in works.items()}

    return call


def hooked_finalize[**Arguments, Result](
    finalize: Callable[Arguments, Result],
) -> Callable[Arguments, Result]:
    """The function that a schedule calls after its last pass (`finalize_model_grads_func`), within hooks."""

    @functools.wraps(finalize)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with _around(lambda hooks: hooks.around_finalize()):
            return finalize(*args, **kwargs)

    return call


def argument_of(
    function: Callable[..., Any], name: str
) -> Callable[[tuple[Any, ...], Mapping[str, Any]], Any]:
    """How to find a parameter's value in (args, kwargs) of a call; None if it is left out."""
    position = list(inspect.signature(function).parameters).index(name)
    return lambda args, kwargs: args[position] if position < len(args) else kwargs.get(name)


def _end_in_flight(work: Any, end: str, peer: int) -> WorkInFlight:
    direction: Direction = "send" if end.startswith("send") else "recv"
    return WorkInFlight(work, partial(_around_wait, direction, (peer,)))


def _around_wait(direction: Direction, peers: tuple[int, ...]) -> AbstractContextManager[Any]:
    return _around(lambda hooks: hooks.around_wait(direction, peers))


@contextmanager
def _around(context_of: Callable[[PassHooks], AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as contexts:
        # The first subscriber is innermost.
        for hooks in reversed(_subscribers):
            contexts.enter_context(context_of(hooks))
        yield
