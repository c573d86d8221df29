"""What a rank's device did in the traced step: torch.profiler's trace, with the phases as ranges.

Spans of the host (`metrics/timeline.py`) show where it waits; this shows kernels and copies. On CUDA the same
ranges are NVTX's, for Nsight Systems. Nothing of it exists in steps that are not traced.
"""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from parallel.watchdog.recorder import NamedPhase, Recorder

MOST_PHASES = 3000
"""Phases after which the profile ends, within the step: a step of 1,024 micro-batches would be gigabytes."""


class RangeRecorder(Recorder):
    """A recorder of phases that also marks them as ranges of the profiler, and of NVTX on CUDA."""

    def __init__(self, *, uses_nvtx: bool, after_most: Callable[[], None]) -> None:
        """`after_most` is called once `MOST_PHASES` have begun; from then on phases are recorded only."""
        super().__init__()
        self._uses_nvtx = uses_nvtx
        self._after_most = after_most
        self._num_begun = 0
        self._open: dict[NamedPhase, tuple[record_function, Any]] = {}

    def begin(self, phase: NamedPhase, at_s: float, depth: int) -> None:
        """A phase begins, and its range."""
        super().begin(phase, at_s, depth)
        self._num_begun += 1
        if self._num_begun == MOST_PHASES:
            self._after_most()
        if self._num_begun < MOST_PHASES:
            marked = record_function(phase.name)
            marked.__enter__()
            # Not pushed and popped: overlapped phases do not end in the reverse of their order.
            self._open[phase] = marked, torch.cuda.nvtx.range_start(phase.name) if self._uses_nvtx else None

    def end(self, phase: NamedPhase, at_s: float) -> None:
        """A phase ends, and its range."""
        super().end(phase, at_s)
        if phase in self._open:
            marked, nvtx_range = self._open.pop(phase)
            marked.__exit__(None, None, None)
            if nvtx_range is not None:
                torch.cuda.nvtx.range_end(nvtx_range)


class DeviceTrace:
    """Profiles a `with` block on one rank, and writes the trace."""

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
        self._profile = profile(activities=activities)
        self._is_running = False
        self.recorder = RangeRecorder(uses_nvtx=is_cuda, after_most=self._stop)

    def __enter__(self) -> Self:
        self._profile.start()
        self._is_running = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._is_running:
            self._is_running = False
            self._profile.stop()

    def write(self, path: Path) -> None:
        """Write the trace for Perfetto or chrome://tracing. Raises OSError if it cannot be written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._profile.export_chrome_trace(str(path))


class NoDeviceTrace:
    """The trace of a rank that profiles nothing, but records its phases."""

    def __init__(self) -> None:
        self.recorder = Recorder()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write(self, path: Path) -> None:
        """Nothing."""
