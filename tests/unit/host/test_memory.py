"""Regions of host memory share no page, so that CUDA can lock each."""

import mmap
from itertools import pairwise

import pytest
import torch

from parallel.activations.pool import HostPool
from parallel.activations.sizes import BLOCK_BYTES
from parallel.host.memory import HostMemoryError, map_pages, whole_pages


def pages(region: torch.Tensor) -> tuple[int, int]:
    """First page of a region, and the one after its last."""
    start, end = region.data_ptr(), region.data_ptr() + region.nbytes
    return start // mmap.PAGESIZE, -(-end // mmap.PAGESIZE)


def test_regions_begin_at_a_page_and_share_none() -> None:
    locked: list[torch.Tensor] = []
    held = [map_pages(num_bytes) for num_bytes in (1, 100, 4096, 4097, 70_000)]
    held += [HostPool(BLOCK_BYTES * number, locked.append)._memory for number in (1, 3)]
    assert len(locked) == 2
    assert [region.data_ptr() % mmap.PAGESIZE for region in held] == [0] * len(held)
    assert all(one[1] <= other[0] for one, other in pairwise(sorted(map(pages, held))))


def test_a_region_is_zeros_of_the_bytes_asked_for_and_can_be_written() -> None:
    region = map_pages(10_000)
    assert (region.dtype, region.nbytes, int(region.count_nonzero())) == (torch.uint8, 10_000, 0)
    region[:8].view(torch.float32).fill_(1.5)
    assert region[4:8].view(torch.float32).item() == 1.5
    assert map_pages(0).nbytes == 0
    assert (whole_pages(1), whole_pages(4096), whole_pages(0)) == (4096, 4096, 0)


def test_too_much_is_a_named_error() -> None:
    with pytest.raises(HostMemoryError, match="bytes cannot be mapped"):
        map_pages(1 << 60)
