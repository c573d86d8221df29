"""Messages between a rank and its reading process: what arrives is what was sent, without a copy."""

import errno
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from k25_train.data.channel import Channel, readable


@dataclass
class Message:
    """Arrays among other things."""

    numbers: tuple[int, ...]
    tensor: torch.Tensor
    array: np.ndarray


def test_a_message_arrives_as_it_was_sent() -> None:
    one, other = Channel.pair()
    tensor = torch.arange(10_000, dtype=torch.int32).view(100, 100)
    sent = Message((1, 2), tensor[:, ::3], np.arange(7, dtype=np.float32))
    one.send([sent, torch.zeros(3, 0, dtype=torch.bool), {"error": KeyError("x")}])
    received, empty, errors = other.receive()
    assert received.numbers == (1, 2)
    assert torch.equal(received.tensor, tensor[:, ::3])
    assert received.tensor.dtype is torch.int32
    assert np.array_equal(received.array, sent.array)
    assert (empty.shape, empty.dtype) == ((3, 0), torch.bool)
    assert repr(errors) == "{'error': KeyError('x')}"


def test_arrays_stay_where_they_arrived_and_can_be_written() -> None:
    """Aligned, in one mapping: unpickling has copied nothing, and the mapping lives as long as they do."""
    one, other = Channel.pair()
    one.send([torch.full((1000,), number) for number in range(3)])
    received = other.receive()
    addresses = [tensor.data_ptr() for tensor in received]
    assert [address % 64 for address in addresses] == [0, 0, 0]
    assert addresses == list(range(addresses[0], addresses[0] + 3 * 8000, 8000))
    last = received.pop()
    del received
    last += 1
    assert last.tolist() == [3] * 1000


def test_memory_is_used_again_once_its_arrays_are_gone() -> None:
    one, other = Channel.pair()

    def pass_on(number: int) -> torch.Tensor:
        one.send(torch.full((5000,), number))
        received = other.receive()
        # What is free is told with the next message of the other direction.
        other.send(None)
        one.receive()
        return received

    first = pass_on(0)
    address = first.data_ptr()
    second = pass_on(1)
    assert second.data_ptr() != address
    assert first.tolist() == [0] * 5000
    part = first[7:9]
    del first
    third = pass_on(2)
    assert third.data_ptr() != address, "a part of it is still used"
    assert part.tolist() == [0, 0]
    del part, third
    pass_on(3)
    assert pass_on(4).data_ptr() == address
    assert second.tolist() == [1] * 5000


def test_larger_messages_get_larger_memory() -> None:
    """Nor does what was too small stay mapped."""
    one, other = Channel.pair()
    for size in (10, 10_000, 100, 1_000_000, 10):
        one.send(torch.arange(size))
        assert other.receive().tolist() == list(range(size))
        other.send(None)
        one.receive()
    assert len(one._written._regions) == len(other.received._regions) == 1


def test_memory_is_page_locked_once_and_released() -> None:
    one, other = Channel.pair()
    told: list[str] = []

    def pin(memory: np.ndarray) -> Callable[[], None]:
        told.append(f"pin {len(memory)}")
        return lambda: told.append("unpin")

    other.received.page_lock = pin
    for size in (1000, 1000, 900, 5000):
        one.send(torch.zeros(size, dtype=torch.uint8))
        other.receive()
        other.send(None)
        one.receive()
    assert told == ["pin 4096", "unpin", "pin 8192"]


def test_nothing_is_left_open() -> None:
    one, other = Channel.pair()
    found = []
    for _ in range(50):
        one.send(torch.ones(1000))
        other.receive()
        other.send(None)
        one.receive()
        found.append(len(os.listdir("/proc/self/fd")))
    assert found[3:] == [found[-1]] * 47


def test_the_end_of_the_other_side_is_noticed() -> None:
    one, other = Channel.pair()
    one.close()
    with pytest.raises(EOFError):
        other.receive()
    with pytest.raises(BrokenPipeError):
        other.send("anybody there?")


def test_memory_that_does_not_arrive_is_a_named_error() -> None:
    """The kernel drops a descriptor without a word where a process has all that it may."""
    one, other = Channel.pair()
    one.send(torch.ones(1000))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="ulimit -n") as caught:
            other.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.errno == errno.EMFILE


def test_descriptors_of_any_number_are_waited_for() -> None:
    """`select` refuses those from 1024 on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    one, other = Channel.pair()
    copies = [os.dup(other.fileno()) for _ in range(1100)]
    try:
        high_one, high_other = Channel.pair()
        assert high_one.fileno() > 1024
        assert readable([one, high_one], 0.0) == []
        high_other.send("a message")
        assert readable([one, high_one], 5.0) == [high_one]
        high_other.close()
        other.close()
    finally:
        for copy in copies:
            os.close(copy)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert one in readable([one, high_one], 5.0), "the other end is gone"
