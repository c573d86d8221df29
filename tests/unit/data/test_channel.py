"""Messages between a rank and its reading process: what arrives is what was sent, without a copy."""

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from k25_train.data.channel import Channel


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


def test_nothing_is_left_open() -> None:
    one, other = Channel.pair()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        one.send(torch.ones(1000))
        other.receive()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_end_of_the_other_side_is_noticed() -> None:
    one, other = Channel.pair()
    one.close()
    with pytest.raises(EOFError):
        other.receive()
    with pytest.raises(BrokenPipeError):
        other.send("anybody there?")
