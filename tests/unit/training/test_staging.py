"""Page-locked memory is allocated once, and never overwritten before the device has copied from it."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from k25_train.training.staging import NoStaging, PinnedStaging


class Device:
    """Copies late: what was queued is done when somebody waits for an event that comes after it."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.allocated: list[int] = []
        self.received: list[list[float]] = []

    def copy(self, tensor: Tensor) -> None:
        self.queue.append(lambda: self.received.append(tensor.tolist()))

    def allocate(self, num_bytes: int) -> Tensor:
        self.allocated.append(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def run(self, until: int) -> None:
        for operation in self.queue[:until]:
            operation()
        del self.queue[:until]


class LateEvent:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.marks: list[object] = []

    def record(self) -> None:
        self.marks.append(mark := lambda: None)
        self.device.queue.append(mark)

    def synchronize(self) -> None:
        if self.marks and self.marks[-1] in self.device.queue:
            self.device.run(self.device.queue.index(self.marks[-1]) + 1)


class ForgetfulEvent(LateEvent):
    def synchronize(self) -> None:
        """A planted fault: nobody waits."""


def received_over_steps(event: type[LateEvent], sizes: list[int]) -> tuple[list[list[float]], list[int]]:
    device = Device()
    staging = PinnedStaging(device.allocate, lambda: event(device), lambda tensor: False)
    for step, size in enumerate(sizes):
        staged = staging.stage([torch.full((size,), float(step)), torch.tensor([step], dtype=torch.int32)])
        for tensor in staged:
            device.copy(tensor)
    device.run(len(device.queue))
    return device.received, device.allocated


def test_nothing_is_overwritten_before_it_is_copied() -> None:
    sizes = [40, 30, 40, 20, 40]
    received, allocated = received_over_steps(LateEvent, sizes)
    assert received == [each for step, size in enumerate(sizes) for each in ([step] * size, [step])]
    assert len(allocated) == 2, "a slot for a step, one for the next"


def test_without_waiting_it_would_be() -> None:
    received, _ = received_over_steps(ForgetfulEvent, [40] * 5)
    assert received[0] != [0.0] * 40


def test_slots_grow_with_room_to_spare() -> None:
    received, allocated = received_over_steps(LateEvent, [100, 100, 110, 110, 1000, 10])
    assert received[8] == [4.0] * 1000
    assert len(allocated) == 3


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 5)])
def test_types_and_shapes_stay(shape: tuple[int, ...]) -> None:
    device = Device()
    staging = PinnedStaging(device.allocate, lambda: LateEvent(device), lambda tensor: False)
    tensor = torch.ones(shape, dtype=torch.bool)
    (staged, other) = staging.stage([tensor, torch.arange(3)])
    assert staged.shape == tensor.shape
    assert torch.equal(staged, tensor)
    assert other.tolist() == [0, 1, 2]
    assert staged.data_ptr() != tensor.data_ptr() or not tensor.numel()


def test_what_is_page_locked_is_held_until_it_is_copied() -> None:
    """Whoever owns the memory writes it again when nobody refers to it."""
    device = Device()
    staging = PinnedStaging(device.allocate, lambda: LateEvent(device), lambda tensor: True)
    alive = []
    for _ in range(4):
        tensor = torch.ones(3)
        assert staging.stage([tensor])[0] is tensor
        alive.append(weakref.ref(tensor))
        del tensor
        held = [each() is not None for each in alive]
        assert held == [False] * (len(alive) - 2) + [True] * min(len(alive), 2)
    assert device.allocated == []


def test_on_the_cpu_nothing_moves() -> None:
    tensor = torch.ones(3)
    assert NoStaging().stage([tensor])[0] is tensor
