"""What megatron-core and torch.distributed do is traced, with the ranks that each call waits for."""

import inspect
from typing import Any

import pytest
import torch.distributed as dist

from parallel.megatron.patches import instrument, pass_hooks
from parallel.megatron.patches.pass_hooks import Passes
from parallel.watchdog.phases import PhaseTracker


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> PhaseTracker:
    tracker = PhaseTracker(1)
    monkeypatch.setattr(instrument, "_tracker", tracker)
    monkeypatch.setattr(pass_hooks, "_subscribers", [instrument.TracePasses()])
    monkeypatch.setattr(instrument, "_members", lambda group: group or (0, 1, 2, 3))
    return tracker


def test_a_collective_waits_for_its_group_and_a_broadcast_for_its_source(tracker: PhaseTracker) -> None:
    def all_reduce(_tensor: int, _op: str = "sum", group: Any = None) -> tuple[int, ...]:
        return tracker.state().waits_for

    def broadcast(_tensor: int, src: int | None = None, group: Any = None) -> tuple[int, ...]:
        return tracker.state().waits_for

    reduce = instrument.traced_collective(all_reduce, "all-reduce")
    assert reduce(0) == (0, 2, 3)
    assert reduce(0, "max", (1, 3)) == (3,)
    assert reduce(0, group=(0, 1)) == (0,)
    spread = instrument.traced_collective(broadcast, "broadcast")
    assert spread(0, 2, (1, 2, 3)) == (2,)
    assert spread(0, src=1, group=(1, 2, 3)) == (2, 3), "the source waits for all"
    assert tracker.state().phases == ()


class Work(dist.Work):
    """Communication in flight that says what its rank does while it is waited for."""

    def __init__(self, tracker: PhaseTracker) -> None:
        super().__init__()
        self.tracker = tracker

    def wait(self, *_: Any) -> str:
        return f"{self.tracker.state().phases} {self.tracker.state().waits_for}"


def test_work_is_traced_again_where_it_is_waited_for(tracker: PhaseTracker) -> None:
    start = instrument.traced_collective(lambda group=None: Work(tracker), "all-to-all")
    work = start((1, 2))
    assert tracker.state().phases == ()
    assert work.wait() == "('all-to-all',) (2,)"


def test_each_pipeline_handle_waits_for_its_neighbour(tracker: PhaseTracker) -> None:
    def start(**_: Any) -> dict[str, Work]:
        assert tracker.state().waits_for == (0, 2)
        return {"send_next": Work(tracker), "recv_prev": Work(tracker)}

    works = pass_hooks.hooked_exchange(start)(
        tensor_send_prev=None,
        tensor_recv_prev=1,
        tensor_send_next=1,
        tensor_recv_next=None,
        prev_pipeline_rank=0,
        next_pipeline_rank=2,
    )
    assert works["send_next"].wait() == "('pipeline send',) (2,)"
    assert works["recv_prev"].wait() == "('pipeline recv',) (0,)"


def test_without_a_tracker_functions_are_called_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instrument, "_tracker", None)
    work = object()
    assert instrument.traced_collective(lambda group=None: work, "all-to-all")() is work
    with instrument.TracePasses().around_pass(Passes.forward), instrument._phase("reduce gradients"):
        pass


POINT_TO_POINT = {
    "batch_isend_irecv",
    "irecv",
    "isend",
    "recv",
    "recv_object_list",
    "send",
    "send_object_list",
}
"""Not traced in torch: megatron-core's pipeline exchanges are, with the neighbour that each waits for."""


def test_every_collective_of_torch_is_traced() -> None:
    """One that a new version adds belongs into the table."""
    module = dist.distributed_c10d
    functions = {
        name: getattr(module, name) for name in module.__all__ if name.islower() and name != "reduce_op"
    }
    collectives = {
        name
        for name, function in functions.items()
        if inspect.isfunction(function)
        and {"group"} < set(inspect.signature(function).parameters)
        and not name.startswith(("get_", "new_", "shrink_", "split_"))
    }
    assert collectives - POINT_TO_POINT == set(instrument.COLLECTIVES)
