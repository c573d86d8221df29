"""Traces what megatron-core and torch.distributed do: phases and the ranks they wait for.

Nothing is changed in what they do: each function below is called within a phase of the tracker. The tracker
is kept in this module because those functions are upstream's and cannot be passed one. Without a tracker
(as in tests of single functions) there are no phases.

Collectives are traced where they are called. What is only started there and waited for later (pipeline sends
and receives, overlapped exchanges) is traced again when somebody waits.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch.distributed as dist

from parallel.megatron.patches.in_flight import WorkInFlight
from parallel.megatron.patches.pass_hooks import Direction, Passes, PassHooks, argument_of, subscribe
from parallel.watchdog.phases import Peers, PhaseTracker

_tracker: PhaseTracker | None = None
_traced: set[str] = set()

COLLECTIVES = {
    "all_gather": "all-gather",
    "all_gather_coalesced": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_gather_object": "all-gather",
    "all_gather_single": "all-gather",
    "all_reduce": "all-reduce",
    "all_reduce_coalesced": "all-reduce",
    "all_to_all": "all-to-all",
    "all_to_all_single": "all-to-all",
    "barrier": "barrier",
    "broadcast": "broadcast",
    "broadcast_object_list": "broadcast",
    "gather": "gather",
    "gather_object": "gather",
    "monitored_barrier": "barrier",
    "reduce": "reduce",
    "reduce_scatter": "reduce-scatter",
    "reduce_scatter_single": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "scatter": "scatter",
    "scatter_object_list": "scatter",
}
"""Functions of torch.distributed -> the phase of a call."""
_BUCKET_GROUP_PHASES = {
    "start_grad_sync": "reduce gradients",
    "finish_grad_sync": "reduce gradients",
    "start_param_sync": "gather parameters",
    "finish_param_sync": "gather parameters",
}
"""Methods of megatron-core's bucket groups -> the phase of a call."""


def set_tracker(tracker: PhaseTracker | None) -> None:
    """Trace with `tracker` what this process does from now on; None stops tracing."""
    global _tracker
    _tracker = tracker


def trace_collectives() -> None:
    """Wrap the collectives of torch.distributed, before megatron-core imports them by name. Idempotent."""
    if _is_first("torch.distributed"):
        for name, phase in COLLECTIVES.items():
            setattr(dist, name, traced_collective(getattr(dist, name), phase))


def trace_megatron() -> None:
    """Trace megatron-core's passes, pipeline exchanges and buffers. Idempotent; imports megatron-core.

    The first two need `pass_hooks.install()`.
    """
    if not _is_first("megatron.core"):
        return
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup

    # Subscribed first, hence innermost: work that others do before a pass is not part of its phase.
    subscribe(TracePasses())
    for name, phase in _BUCKET_GROUP_PHASES.items():
        setattr(BucketGroup, name, traced_buffer(getattr(BucketGroup, name), phase))


class TracePasses(PassHooks):
    """Passes and pipeline exchanges as phases of the tracker."""

    def around_pass(self, passes: Passes) -> AbstractContextManager[Any]:
        """A phase that communicates with nobody by itself."""
        return _phase(passes.value)

    def around_exchange(self, peers: tuple[int, ...]) -> AbstractContextManager[Any]:
        """A phase that waits for the neighbouring stages."""
        return _phase("pipeline send/recv", peers)

    def around_wait(self, direction: Direction, peers: tuple[int, ...]) -> AbstractContextManager[Any]:
        """A phase that waits for one neighbouring stage, or both."""
        return _phase(f"pipeline {direction}", peers)


def traced_collective(collective: Callable[..., Any], phase: str) -> Callable[..., Any]:
    """A function of torch.distributed within a phase that waits for its group, or for the source alone."""
    group_of = argument_of(collective, "group")
    source_of = argument_of(collective, "src") if phase == "broadcast" else None

    @functools.wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _tracker is None:
            return collective(*args, **kwargs)
        peers: Peers = partial(_members, group_of(args, kwargs))
        # In a broadcast, all but the source wait for the source alone.
        source = source_of(args, kwargs) if source_of is not None else None
        if source is not None and source != _tracker.rank:
            peers = (source,)
        # A handle comes back if the collective is asynchronous: waiting for it is the same phase again.
        with _tracker.phase(phase, peers):
            result = collective(*args, **kwargs)
        is_in_flight = isinstance(result, dist.Work)
        return WorkInFlight(result, partial(_phase, phase, peers)) if is_in_flight else result

    return call


def traced_buffer(method: Callable[..., Any], phase: str) -> Callable[..., Any]:
    """A method of megatron-core's bucket groups within a phase that waits for the ranks of its buffers."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _phase(phase, partial(_members, self.intra_distributed_optimizer_instance_group)):
            return method(self, *args, **kwargs)

    return call


def waiting_for(peers: Peers, name: str) -> AbstractContextManager[Any]:
    """A phase in which code that is passed no tracker waits for other ranks."""
    return _phase(name, peers)


def _phase(name: str, peers: Peers = ()) -> AbstractContextManager[Any]:
    return nullcontext() if _tracker is None else _tracker.phase(name, peers)


def _members(group: Any) -> Sequence[int]:
    return dist.get_process_group_ranks(group)


def _is_first(package: str) -> bool:
    is_first = package not in _traced
    _traced.add(package)
    return is_first
