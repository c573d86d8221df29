"""Announces to the watch what megatron-core and torch.distributed do: phases and the ranks they wait for.

Nothing is changed in what they do: each function below is called as it is, within a phase. The watch stands
in this module because those functions are upstream's, and nobody can pass them one. Without a watch (as in
tests of single functions) they are called directly.

Collectives are announced where they are called. What is only started there and waited for later (pipeline
sends and receives, overlapped exchanges) is announced again when somebody waits.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist

from parallel.watchdog.phases import Peers, PhaseTracker

_tracker: PhaseTracker | None = None
_wrapped: set[str] = set()

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
"""Functions of torch.distributed -> the phase that a call is."""
_PIPELINE_PEERS = {
    "tensor_send_prev": "prev_pipeline_rank",
    "tensor_recv_prev": "prev_pipeline_rank",
    "tensor_send_next": "next_pipeline_rank",
    "tensor_recv_next": "next_pipeline_rank",
}


def set_tracker(tracker: PhaseTracker | None) -> None:
    """Announce what this process does from now on to `tracker`; None ends it."""
    global _tracker
    _tracker = tracker


def announce_collectives() -> None:
    """Wrap torch.distributed's, before modules of megatron-core take them over by name. Idempotent."""
    if _is_first("torch.distributed"):
        for name, phase in COLLECTIVES.items():
            setattr(dist, name, announced_collective(getattr(dist, name), phase))


def announce_megatron() -> None:
    """Wrap megatron-core's passes, pipeline exchanges and buffers, which imports it. Idempotent."""
    if _is_first("megatron.core"):
        _announce_passes()
        _announce_pipeline()
        _announce_buffers()


def _is_first(package: str) -> bool:
    is_first = package not in _wrapped
    _wrapped.add(package)
    return is_first


def announced(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
    """`function` within a phase that communicates with nobody by itself."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _tracker is None:
            return function(*args, **kwargs)
        with _tracker.phase(phase):
            return function(*args, **kwargs)

    return call


def announced_collective(collective: Callable[..., Any], phase: str) -> Callable[..., Any]:
    """A function of torch.distributed within a phase that waits for its group, or for the source alone."""
    names = list(inspect.signature(collective).parameters)
    group_place = names.index("group")
    src_place = names.index("src") if phase == "broadcast" else None

    @functools.wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _tracker is None:
            return collective(*args, **kwargs)
        group = kwargs.get("group") if len(args) <= group_place else args[group_place]
        peers: Peers = partial(_members, group)
        if src_place is not None:
            src = kwargs.get("src") if len(args) <= src_place else args[src_place]
            if src is not None and src != _tracker.rank:
                peers = (src,)
        with _tracker.phase(phase, peers):
            result = collective(*args, **kwargs)
        return TracedWork(result, phase, peers) if isinstance(result, dist.Work) else result

    return call


class TracedWork:
    """Communication under way; waiting for it is a phase."""

    __slots__ = ("_peers", "_phase", "_work")

    def __init__(self, work: Any, phase: str, peers: Peers) -> None:
        self._work = work
        self._phase = phase
        self._peers = peers

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """Wait for it, as `torch.distributed.Work.wait`."""
        if _tracker is None:
            return self._work.wait(*args, **kwargs)
        with _tracker.phase(self._phase, self._peers):
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _members(group: Any) -> Sequence[int]:
    return dist.get_process_group_ranks(group)


def _announce_passes() -> None:
    """Forward and backward of a micro-batch through a chunk; both in one where expert exchanges overlap."""
    from megatron.core.pipeline_parallel import combined_1f1b, schedules

    schedules.forward_step = announced(schedules.forward_step, "forward")
    schedules.backward_step = announced(schedules.backward_step, "backward")
    combined = announced_combined(combined_1f1b.combined_forward_backward_step)
    combined_1f1b.combined_forward_backward_step = combined


def announced_combined(combined: Callable[..., Any]) -> Callable[..., Any]:
    """megatron-core's overlapped step; warm-up and cool-down of the pipeline call it for one pass alone."""
    names = list(inspect.signature(combined).parameters)
    forward_place, backward_place = names.index("f_model"), names.index("b_model")
    forward, backward = announced(combined, "forward"), announced(combined, "backward")
    both = announced(combined, "forward and backward")

    @functools.wraps(combined)
    def call(*args: Any, **kwargs: Any) -> Any:
        if args[backward_place] is None:
            return forward(*args, **kwargs)
        if args[forward_place] is None:
            return backward(*args, **kwargs)
        return both(*args, **kwargs)

    return call


def _announce_pipeline() -> None:
    from megatron.core.pipeline_parallel import p2p_communication

    for name in ("_p2p_ops", "_batched_p2p_ops"):
        setattr(p2p_communication, name, announced_pipeline(getattr(p2p_communication, name)))


def announced_pipeline(start_exchange: Callable[..., Any]) -> Callable[..., Any]:
    """megatron-core's exchange with neighbouring stages: each of its handles waits for one of them."""

    @functools.wraps(start_exchange)
    def call(**kwargs: Any) -> Any:
        if _tracker is None:
            return start_exchange(**kwargs)
        ends = {end: kwargs[rank] for end, rank in _PIPELINE_PEERS.items() if kwargs[end] is not None}
        with _tracker.phase("pipeline send/recv", tuple(ends.values())):
            works = start_exchange(**kwargs)
        if isinstance(works, dict):
            return {end: _pipeline_work(work, end, ends[f"tensor_{end}"]) for end, work in works.items()}
        return [TracedWork(work, "pipeline send/recv", tuple(ends.values())) for work in works]

    return call


def _pipeline_work(work: Any, end: str, peer: int) -> TracedWork:
    direction = "send" if end.startswith("send") else "recv"
    return TracedWork(work, f"pipeline {direction}", (peer,))


def _announce_buffers() -> None:
    """Starting and finishing the exchange of gradients and parameters among data-parallel ranks."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup

    phases = {
        "start_grad_sync": "reduce gradients",
        "finish_grad_sync": "reduce gradients",
        "start_param_sync": "gather parameters",
        "finish_param_sync": "gather parameters",
    }
    for name, phase in phases.items():
        setattr(BucketGroup, name, announced_buffer(getattr(BucketGroup, name), phase))


def announced_buffer(method: Callable[..., Any], phase: str) -> Callable[..., Any]:
    """A method of megatron-core's bucket groups within a phase that waits for the ranks of its buffers."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _tracker is None:
            return method(self, *args, **kwargs)
        with _tracker.phase(phase, partial(_members, self.intra_distributed_optimizer_instance_group)):
            return method(self, *args, **kwargs)

    return call
