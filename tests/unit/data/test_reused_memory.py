"""Memory is used again when nobody holds it, and never before."""

import torch

from k25_train.data.reused_memory import ReusedMemory


def test_memory_is_used_again_only_when_all_of_it_is_dropped() -> None:
    memory = ReusedMemory()
    first, second = torch.from_numpy(memory.array(10, 4)).split([4, 6])
    address = first.data_ptr()
    del first
    other = torch.from_numpy(memory.array(10, 4))
    assert other.data_ptr() != address
    row = second[2]
    del second
    another = torch.from_numpy(memory.array(10, 4))
    assert another.data_ptr() != address
    del row
    assert memory.array(9, 4).ctypes.data == address


def test_what_is_too_small_is_given_up() -> None:
    memory = ReusedMemory()
    memory.array(4, 4)
    large = memory.array(100, 4)
    assert large.shape == (100, 4)
    assert memory.array(0, 4).shape == (0, 4)
