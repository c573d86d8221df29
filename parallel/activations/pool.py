"""Page-locked host memory for saved tensors: allocated once, as a whole, and handed out in blocks.

There are no free lists by size: an expert's number of tokens differs from step to step, and a block reserved
for one size is lost to all others. Nothing is page-locked during a step, which would stall the device.
"""

from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from parallel.activations.sizes import BLOCK_BYTES, block_bytes
from parallel.host.memory import HostMemoryError, map_pages
from parallel.units import GIB


class HostBudgetError(RuntimeError):
    """More tensors to hold in host memory than `activation.host_gib` has room for."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block of the pool."""

    start: int
    """Offset in the pool, in bytes."""
    memory: Tensor
    """The block itself: uint8, at least as many bytes as were requested."""


@dataclass(slots=True)
class _Gap:
    start: int
    end: int


class HostPool:
    """Blocks of host memory, up to a budget."""

    def __init__(self, num_bytes: int, pin: Callable[[Tensor], None]) -> None:
        """
        Args:
            num_bytes: the budget, allocated immediately.
            pin: page-locks memory, or raises `HostMemoryError`.

        Raises `HostMemoryError` if the host does not have the memory, or cannot page-lock it.
        """
        num_bytes -= num_bytes % BLOCK_BYTES
        try:
            self._memory = map_pages(num_bytes)
            # A rank whose passes all stay on the device needs none, and CUDA cannot lock zero bytes.
            if num_bytes:
                pin(self._memory)
        except RuntimeError as error:
            raise HostMemoryError(
                f"activation.host_gib: the host has no {num_bytes / GIB:.4g} GiB of page-locked memory for "
                f"every rank on it ({error}): lower it, or raise the limit of locked memory (ulimit -l)"
            ) from error
        self._gaps = [_Gap(0, num_bytes)] if num_bytes else []
        self.held_bytes = 0
        """Bytes in blocks that are in use."""
        self.peak_bytes = 0
        """Maximum of `held_bytes` since the last `restart_peak`."""

    def take(self, num_bytes: int) -> Block:
        """A block from the smallest gap that fits (best fit); `HostBudgetError` if none does."""
        size = block_bytes(num_bytes)
        fitting = [gap for gap in self._gaps if gap.end - gap.start >= size]
        if not fitting:
            raise HostBudgetError(self._explain(num_bytes))
        # The block is the beginning of the gap; an empty gap is removed.
        gap = min(fitting, key=lambda each: each.end - each.start)
        block = Block(gap.start, self._memory[gap.start : gap.start + size])
        gap.start += size
        if gap.start == gap.end:
            self._gaps.remove(gap)
        self.held_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return block

    def give(self, block: Block) -> None:
        """Take a block back, and merge it with the gaps around it."""
        end = block.start + block.memory.nbytes
        self.held_bytes -= block.memory.nbytes
        index = bisect(self._gaps, block.start, key=lambda gap: gap.start)
        gap = _Gap(block.start, end)
        # 1. Merge with the gap that begins where the block ends.
        if index < len(self._gaps) and self._gaps[index].start == end:
            gap.end = self._gaps.pop(index).end
        # 2. Merge with the gap that ends where the block begins.
        if index and self._gaps[index - 1].end == block.start:
            index -= 1
            gap.start = self._gaps.pop(index).start
        self._gaps.insert(index, gap)

    def restart_peak(self) -> None:
        """Measure the peak from the bytes held now."""
        self.peak_bytes = self.held_bytes

    def _explain(self, num_bytes: int) -> str:
        largest = max((gap.end - gap.start for gap in self._gaps), default=0)
        return (
            f"activation.host_gib = {self._memory.nbytes / GIB:.4g}: no room for a tensor of {num_bytes} "
            f"bytes; {self.held_bytes} of {self._memory.nbytes} are held, the largest gap has {largest}: "
            "raise it, or offload fewer tensors"
        )
