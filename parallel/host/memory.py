"""Regions of host memory that share no page with anything else, so that each can be page-locked alone."""

import contextlib
import mmap

import torch
from torch import Tensor


class HostMemoryError(RuntimeError):
    """Host memory that cannot be allocated or page-locked."""


def whole_pages(num_bytes: int) -> int:
    """The bytes of the pages that hold so many bytes."""
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def map_pages(num_bytes: int) -> Tensor:
    """Zeros, uint8 [num_bytes], that begin at a page and share their last one with nothing.

    Memory of the C library's heap may share pages with its neighbours, and CUDA refuses to lock a page twice
    (cudaErrorHostMemoryAlreadyRegistered, 712). Pages are taken when they are first written or locked.

    Raises `HostMemoryError` if the host does not have so many.
    """
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    # Not mmap's default, which is shared memory: containers limit that.
    try:
        pages = mmap.mmap(-1, whole_pages(num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise HostMemoryError(f"{num_bytes:,} bytes cannot be mapped: {error}") from error
    # Locking walks over every page: 34 GB have 8 million small ones.
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8, count=num_bytes)
