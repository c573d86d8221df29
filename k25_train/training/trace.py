"""The timeline of one step of a run: recorded on every rank, reported by the first; and what the device of
the first rank of each stage did, a file for each.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from k25_train.metrics.report import Report
from k25_train.metrics.timeline import RankRecord
from k25_train.training.device_trace import DeviceTrace, NoDeviceTrace, ProfiledTrace
from k25_train.training.run import Run


@contextmanager
def traced(run: Run, report: Report, step: int) -> Iterator[None]:
    """Around a step; if it is `train.trace_step`, its timeline is reported. Called by every rank."""
    if step != run.config.train.trace_step:
        yield
        return
    # 1. Profilers are set up first. All ranks begin together, so that clocks of different nodes can be
    #    aligned at this moment.
    profiles = run.topology.stage_rank == 0
    device_trace: DeviceTrace = ProfiledTrace(run.topology.device) if profiles else NoDeviceTrace()
    with run.tracker.phase("start profiler", may_be_long=True):
        device_trace.start()
    dist.barrier()
    ready_s = time.monotonic()
    recorder = run.tracker.recorder = device_trace.recorder
    try:
        yield
    finally:
        # 2. Recording ends with the step, also with one that fails.
        run.tracker.recorder = None
        with run.tracker.phase("stop profiler", may_be_long=True):
            device_trace.stop()
    record = RankRecord(
        rank=run.topology.rank,
        stage=run.topology.pp_rank,
        replica=run.topology.dp_rank,
        node=socket.gethostname(),
        ready_s=ready_s,
        spans=tuple(recorder.spans),
    )
    # 3. A rank sends some tens of bytes per phase; the others wait while the first one draws, and then for
    #    the profiles.
    with run.tracker.phase("write timeline", may_be_long=True):
        records = [record] * run.topology.world_size if run.is_main else None
        dist.gather_object(record, records)
        if records is not None:
            report.timeline(step, records)
        path = report.folder / "trace" / f"step_{step}.rank_{run.topology.rank}.json"
        try:
            device_trace.write(path)
        except OSError as error:
            report.warn(f"{path}: what the device did cannot be written ({error}); the run goes on")
