"""What makes the host wait for the device, and where it was called: the records of `fake_cuda`."""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from tests.helpers.fake_cuda_device import PinnedMemory

ROOT = Path(__file__).parents[2]
OUR_CODE = tuple(str(ROOT / folder) + os.sep for folder in ("k25_train", "parallel"))
WRAPPERS = str(ROOT / "parallel" / "megatron" / "patches") + os.sep
HERE, TORCH = str(Path(__file__).parent / "fake_cuda"), str(Path(torch.__file__).parent) + os.sep
UPSTREAM_CODE = (f"{os.sep}megatron{os.sep}core{os.sep}", f"{os.sep}transformer_engine{os.sep}")

SIZE_DEPENDS_ON_VALUES = (
    "nonzero", "masked_select", "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive",
    "bincount", "repeat_interleave",
)  # fmt: skip
"""Kernels that tell the host how large their output is."""


@dataclass(frozen=True, slots=True)
class Blocking:
    """One call that makes the host wait for the device."""

    what: str
    """The kernel or function, e.g. `aten._to_copy`."""
    why: str
    """What makes it wait."""
    where: str
    """`file:line function` of the innermost caller in our code or megatron-core's, else in any."""


@dataclass(slots=True)
class Seen:
    """What has run on fake CUDA tensors."""

    blocking: list[Blocking] = field(default_factory=list)
    """What would have made the host wait, in order."""
    kernels: Counter[str] = field(default_factory=Counter)
    """Calls of each kernel that takes or makes CUDA tensors, by name, e.g. `aten._grouped_mm.default`."""
    copied_bytes: Counter[str] = field(default_factory=Counter)
    """Bytes copied: `host to device`, `device to host`."""
    pinned: PinnedMemory = field(default_factory=PinnedMemory)
    """Page-locked host memory; `num_made` counts allocations and registrations."""
    is_on: bool = True
    """Whether calls are recorded."""

    def block(self, what: str, why: str) -> None:
        """Record a call that blocks."""
        if self.is_on:
            self.blocking.append(Blocking(what, why, calling_line()))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within: nothing is recorded. For what comes before the part that is looked at."""
        self.is_on, before = False, self.is_on
        try:
            yield
        finally:
            self.is_on = before

    def lines(self) -> list[str]:
        """What blocks, one line for each place, with the number of calls."""
        counts = Counter((each.what, each.why, each.where) for each in self.blocking)
        return [f"{num} x {what} ({why}) at {where}" for (what, why, where), num in counts.most_common()]

    def why_it_blocks(self, func: Any, args: Any, kwargs: dict[str, Any], *, to_cuda: bool) -> str:
        """Why a call of this kernel makes the host wait; empty if it does not."""
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        if name in ("_to_copy", "copy_", "copy"):
            source = args[1] if name != "_to_copy" else args[0]
            target = args[0] if name != "_to_copy" else None
            position = 2 if name != "_to_copy" else len(args)
            non_blocking = args[position] if len(args) > position else kwargs.get("non_blocking", False)
            return self._why_copy_blocks(source, target, to_cuda=to_cuda, non_blocking=bool(non_blocking))
        if name == "_local_scalar_dense":
            return "a value is read"
        if name in ("equal", "is_nonzero"):
            return "a value is read"
        if name in SIZE_DEPENDS_ON_VALUES:
            return "" if kwargs.get("output_size") is not None else "the size depends on values"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [each for each in args[1] if each is not None]
            if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
                return "the size depends on values"
            if args[0].is_cuda and any(not each.is_cuda for each in indices):
                return "indices in host memory"
        return ""

    def _why_copy_blocks(
        self, source: Tensor, target: Tensor | None, *, to_cuda: bool, non_blocking: bool
    ) -> str:
        from_cuda = source.is_cuda
        if target is not None:
            to_cuda = target.is_cuda
        if from_cuda == to_cuda:
            return ""
        way = "device to host" if from_cuda else "host to device"
        self.copied_bytes[way] += source.numel() * source.element_size()
        if not non_blocking:
            return way
        host = target if from_cuda else source
        # The copy that `.to("cpu", non_blocking=True)` makes is pageable.
        return "" if host is not None and self.pinned.has(host) else f"{way}, pageable"


def calling_line() -> str:
    """Where the present call comes from: `file:line function` of the innermost caller in our code or in
    megatron-core's, else of the innermost one at all."""
    frame: FrameType | None = sys._getframe(1)
    others = []
    while frame is not None:
        file = frame.f_code.co_filename
        line = f"{file.removeprefix(str(ROOT) + os.sep)}:{frame.f_lineno} {frame.f_code.co_name}"
        # Wrappers of calls are not where they come from.
        if file.startswith(OUR_CODE) and not file.startswith(WRAPPERS):
            return line
        for package in UPSTREAM_CODE:
            if package in file:
                return package.strip(os.sep) + os.sep + line.partition(package)[2]
        if not file.startswith((HERE, TORCH)):
            others.append(line)
        frame = frame.f_back
    return others[0] if others else "?"
