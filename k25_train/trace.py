"""The timeline of one step of a run: recorded on every rank, written by the first.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from k25_train.errors import K25Error
from k25_train.metrics.chrome_trace import write_chrome_trace
from k25_train.metrics.timeline import RankRecord, aligned, step_s
from k25_train.metrics.timeline_plot import plot_timeline
from k25_train.run import Run
from parallel.watch.recorder import Recorder


@contextmanager
def traced(run: Run, step: int) -> Iterator[None]:
    """Around a step; if it is `train.trace_step`, writes its timeline. Called by every rank.

    Raises `K25Error` where the disk does not take it.
    """
    if step != run.config.train.trace_step:
        yield
        return
    dist.barrier()
    ready_s = time.monotonic()
    recorder = run.watch.recorder = Recorder()
    yield
    run.watch.recorder = None
    record = RankRecord(
        rank=run.topology.rank,
        stage=run.topology.pp_rank,
        replica=run.topology.dp_rank,
        node=socket.gethostname(),
        ready_s=ready_s,
        spans=tuple(recorder.spans),
    )
    # A rank needs some tens of bytes a phase; the others wait while the first one draws.
    with run.watch.phase("write timeline", may_be_long=True):
        records = [record] * run.topology.world_size if run.is_main else None
        dist.gather_object(record, records)
        if records is not None:
            write_timeline(records, run.folder / "trace", step, run.config.model.name)


def write_timeline(records: list[RankRecord], folder: Path, step: int, model: str) -> None:
    """Write `step_<N>.json` and `step_<N>.png`. Raises `K25Error` where the disk does not take them."""
    of_all = aligned(records)
    title = f"{model}, step {step}: what {len(records)} ranks did in {step_s(of_all):.3f} s"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_chrome_trace(of_all, folder / f"step_{step}.json", title)
        plot_timeline(of_all, folder / f"step_{step}.png", title)
    except OSError as error:
        raise K25Error(
            f"{folder}: cannot write the timeline ({error}); make room or set train.trace_step=null"
        ) from error
