"""What a rank's device did in the traced step: torch.profiler's trace, with the phases as ranges.

Spans of the host (`metrics/timeline.py`) show where it waits; this shows kernels and copies. On CUDA the same
ranges are NVTX's, for Nsight Systems. Nothing of it exists in steps that are not traced.
"""

import threading
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from parallel.watchdog.recorder import NamedPhase, Recorder

MOST_PHASES = 500
"""Phases that a trace holds of what comes before the optimizer: the warm-up of a pipeline of 16 stages and
some steady passes. A phase took 110 KB of JSON in a small run on the CPU, and kernels add to that: a file has
50 to 200 MB, where all 1,024 micro-batches of a step would be tens of gigabytes. Our choice."""
OPTIMIZER = "optimizer"
"""Phase from which on all is profiled again."""


class DeviceTrace(Protocol):
    """A rank's part in tracing a step; `start` before it, then `stop`, then `write`."""

    recorder: Recorder
    """Records the phases of the step."""

    def start(self) -> None:
        """Begin to profile. On CUDA the first call sets CUPTI up, which takes seconds."""

    def stop(self) -> None:
        """End profiling. Waits for the device."""

    def write(self, path: Path) -> None:
        """Write a trace for Perfetto or chrome://tracing. Raises OSError if it cannot be written."""


class ProfiledTrace:
    """Profiles operators, on CUDA also kernels and copies, with phases as ranges around them."""

    def __init__(self, device: torch.device) -> None:
        uses_cuda = device.type == "cuda"
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if uses_cuda else [])]
        self._profile = profile(activities=self._activities)
        self.recorder: Recorder = RangeRecorder(self, uses_nvtx=uses_cuda)

    def start(self) -> None:
        """Begin to profile."""
        self._profile.start()

    def collect(self, on: bool) -> None:
        """Leave out what comes from now on, or go on. Waits for nothing: other ranks may need this one."""
        self._profile.toggle_collection_dynamic(on, self._activities)

    def stop(self) -> None:
        """End profiling."""
        self._profile.stop()

    def write(self, path: Path) -> None:
        """Write the trace."""
        path.parent.mkdir(parents=True, exist_ok=True)
        # The profiler does not raise where it cannot write.
        path.touch()
        self._profile.export_chrome_trace(str(path))


class RangeRecorder(Recorder):
    """A recorder of phases that also marks them as ranges of the profiler, and of NVTX on CUDA.

    After `MOST_PHASES` the profiler collects nothing until the optimizer's phase. It can be told so only by
    the thread that started it: backward passes on CUDA have a thread of their own.
    """

    def __init__(self, trace: ProfiledTrace, *, uses_nvtx: bool) -> None:
        super().__init__()
        self._trace = trace
        self._uses_nvtx = uses_nvtx
        self._thread = threading.get_ident()
        self._num_begun = 0
        self._is_collecting = True
        self._open: dict[NamedPhase, tuple[record_function, Any]] = {}

    def begin(self, phase: NamedPhase, at_s: float, depth: int) -> None:
        """A phase begins, and its ranges."""
        super().begin(phase, at_s, depth)
        self._num_begun += 1
        if threading.get_ident() == self._thread:
            self._bound(phase.name)
        marked = record_function(phase.name)
        marked.__enter__()
        # Not pushed and popped: overlapped phases do not end in the reverse of their order.
        self._open[phase] = marked, torch.cuda.nvtx.range_start(phase.name) if self._uses_nvtx else None

    def _bound(self, name: str) -> None:
        collects = name == OPTIMIZER or (self._is_collecting and self._num_begun <= MOST_PHASES)
        if collects != self._is_collecting:
            self._trace.collect(collects)
            self._is_collecting = collects
            self._num_begun = 0

    def end(self, phase: NamedPhase, at_s: float) -> None:
        """A phase ends, and its ranges."""
        super().end(phase, at_s)
        if phase in self._open:
            marked, nvtx_range = self._open.pop(phase)
            marked.__exit__(None, None, None)
            if nvtx_range is not None:
                torch.cuda.nvtx.range_end(nvtx_range)


class NoDeviceTrace:
    """The part of a rank that profiles nothing, but records its phases."""

    def __init__(self) -> None:
        self.recorder = Recorder()

    def start(self) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""

    def write(self, path: Path) -> None:
        """Nothing."""
