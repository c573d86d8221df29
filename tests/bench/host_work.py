"""What the training process does itself between two steps, and how much reading ahead disturbs it.

1. Host work between two steps of `k25_pretrain_4k` on rank 0, which reads, agrees and writes the row, at 256,
   2,048 and 4,096 ranks: seconds that its thread computes, so that waiting for a busy machine does not count.
   The step has 16,384 sequences, some 74,000 documents and 16,800 images; their files are made up.
2. A loop that launches small torch operations with saved-tensor hooks, next to the process that makes the
   next steps and, for comparison, next to a thread that does. Rounds alternate: alone, with the process,
   alone, with the thread. A round lasts what its thread computed or was blocked, the interpreter's lock
   included; only what the kernel made it wait for a core is left out, which on a machine shared with others
   is chance. A node of a cluster has cores for its readers.

Collectives are those of one rank: how long ranks wait for one another is no host work.
Run it as `python -m tests.bench.host_work`.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.data.batch import Reads
from k25_train.data.reading_process import ReadingProcess
from k25_train.data.share_reader import Share
from k25_train.data.source import DataSource, ThreadSource
from tests.helpers.synthetic_index import BLEND, synthetic_data

NODES = (32, 256, 512)
WARM_UP_STEPS, STEPS = 4, 3
"""In the first ones memory is mapped, which is used again later."""
MAX_HOST_WORK_S = 0.050
MAX_GROWTH = 1.2
"""Of the work at most ranks over that at fewest: noise, and nothing that grows."""
ROUNDS, LAUNCHES = 9, 1000
MAX_SLOWDOWN = 1.1
MIN_SEEN = 1.3
"""What a thread has to be seen to do; otherwise the measurement shows nothing."""


def main() -> None:
    """Measure, print, and end with status 1 if a bar is missed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(tempfile.mktemp(), 1), rank=0, world_size=1)
    with synthetic_data():
        works = {}
        for nodes in NODES:
            config = config_of(nodes)
            works[config.world_size] = work = host_work(config)
            print(f"{config.world_size:5,} ranks: {work.line()}", flush=True)
        beside_process, beside_thread = slowdowns(config_of(NODES[-1]))
    ranks = sorted(works)
    worst_s = max(work.total_s for work in works.values())
    growth = works[ranks[-1]].total_s / works[ranks[0]].total_s
    seen = beside_thread >= MIN_SEEN
    missed = [
        worst_s >= MAX_HOST_WORK_S, growth > MAX_GROWTH, beside_process >= MAX_SLOWDOWN, not seen,
    ]  # fmt: skip
    print(f"launch loop next to reading in a thread: {beside_thread:.2f} (must be seen: {MIN_SEEN} or more)")
    print(
        f"host work {1000 * worst_s:.1f} ms (bar {1000 * MAX_HOST_WORK_S:.0f}), at {ranks[-1]:,} ranks "
        f"{growth:.2f} of that at {ranks[0]} (bar {MAX_GROWTH}); launch loop next to the reading process "
        f"{beside_process:.3f} (bar {MAX_SLOWDOWN})"
    )
    sys.exit(any(missed))


def config_of(nodes: int) -> Config:
    """The real run on so many nodes, in number and size of batches."""
    return compose(
        [
            "experiment=k25_pretrain_4k",
            f"cluster.nodes={nodes}",
            "data=smoke",
            *BLEND,
        ]
    )


@dataclass(frozen=True, slots=True)
class Work:
    """Medians over steps of what rank 0 does, in seconds that its thread computes."""

    receive_s: float
    prepare_s: float
    row_s: float
    made_in_s: float
    """What the reading process took for a step, with what its machine made it wait."""
    sizes: Any

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.receive_s + self.prepare_s + self.row_s

    def line(self) -> str:
        """For people."""
        return (
            f"receives in {1000 * self.receive_s:.1f} ms, prepares in {1000 * self.prepare_s:.1f}, row "
            f"{1000 * self.row_s:.2f}; the reading process computes {self.made_in_s:.1f} s "
            f"({self.sizes.num_tokens:,} tokens, {self.sizes.num_items:,} images)"
        )


def share_of(config: Config) -> Share:
    """Rank 0's."""
    return Share(rank=0, dp_rank=0, dp_size=config.dp, reads=Reads(tokens=True, labels=False, pixels=False))


def host_work(config: Config) -> Work:
    """Train without a model: all that rank 0 does for a step but launching it."""
    from k25_train.data.skip_log import SkipLog
    from k25_train.training.inputs import InputReader
    from k25_train.training.rows import metrics_row
    from k25_train.training.staging import NoStaging
    from parallel.watchdog.phases import PhaseTracker

    topology: Any = SimpleNamespace(
        rank=0,
        world_size=1,
        dp_rank=0,
        cp_rank=0,
        cp_size=1,
        holds_first_chunk=True,
        device=torch.device("cpu"),
    )
    times: dict[str, list[float]] = {"receive": [], "step": [], "row": [], "made": []}
    with ReadingProcess(config) as source:
        source.open()
        source.take(share_of(config))
        receive = timed(source.step, times["receive"])
        data: Any = SimpleNamespace(step=receive, skip_log=SkipLog(config.data.max_skipped_samples))
        reader = InputReader(data, topology, NoStaging(), PhaseTracker(0))
        step = timed(reader.step, times["step"])
        row = timed(metrics_row, times["row"])
        for number in range(1, WARM_UP_STEPS + STEPS + 1):
            before_s = cpu_s(source.pid)
            inputs = step(number)
            times["made"].append(cpu_s(source.pid) - before_s)
            row(config, number, result_of(inputs), is_mixed_anew=False)
    receive_s, step_s, row_s, made_s = (median(each[WARM_UP_STEPS:]) for each in times.values())
    return Work(receive_s, step_s - receive_s, row_s, made_s, inputs.sizes)


def timed[Result](function: Callable[..., Result], times_s: list[float]) -> Callable[..., Result]:
    """The function, noting the seconds for which its thread computes."""

    def call(*arguments: Any, **named: Any) -> Result:
        started = time.thread_time()
        result = function(*arguments, **named)
        times_s.append(time.thread_time() - started)
        return result

    return call


def result_of(inputs: Any) -> Any:
    """A step's result as far as its row needs it."""
    from k25_train.training.device_memory import NoMemoryFigures
    from k25_train.training.tower import NoSummary
    from parallel.activations.offload import NoOffload

    return SimpleNamespace(
        sizes=inputs.sizes, served=inputs.served, loss=1.0, grad_norm=1.0, learning_rate=1.0,
        step_time_s=1.0, data_wait_s=0.0, reads={},
        vision=NoSummary(),
        memory=NoMemoryFigures(),
        offload=NoOffload(), clip=SimpleNamespace(max_logits=(1.0,) * 61, heads_clipped=0),
    )  # fmt: skip


def cpu_s(pid: int) -> float:
    """Seconds that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def slowdowns(config: Config) -> tuple[float, float]:
    """Of the launch loop next to the reading process, and next to a thread that reads."""
    with ReadingProcess(config) as process, ThreadSource(config) as thread:
        for source in (process, thread):
            source.open()
            source.take(share_of(config))
        step = 0
        alone: list[float] = []
        beside: dict[str, list[float]] = {"process": [], "thread": []}
        threads: list[tuple[str, DataSource, Callable[[], bool]]] = [
            ("process", process, lambda: is_busy(process.pid)),
            ("thread", thread, lambda: any(not each.done() for each in thread._steps._pending.values())),
        ]
        for _ in range(ROUNDS):
            for name, source, busy in threads:
                while any(each() for *_, each in threads):
                    time.sleep(0.05)
                alone.append(launch_s())
                # The next steps are made from now on.
                source.step(step)
                seconds = launch_s()
                # A round in which the process ended early shows less than there is. The thread may end early
                # because it held the loop up for so long; what it shows is then a lower bound.
                if busy() or source is thread:
                    beside[name].append(seconds)
                step += 1
    print(f"launch loop alone: {1000 * median(alone):.0f} ms, median of {len(alone)} rounds", flush=True)
    for name, seconds in beside.items():
        print(f"  next to the {name}: {1000 * median(seconds):.0f} ms, median of {len(seconds)} rounds")
    return median(beside["process"]) / median(alone), median(beside["thread"]) / median(alone)


def is_busy(pid: int) -> bool:
    """Whether a process computes, or waits for a core to."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "R"


def launch_s() -> float:
    """Seconds that a loop of launches takes, without what the kernel makes it wait for a core."""
    weight = torch.ones(8, 8, requires_grad=True)
    started, waited = time.perf_counter_ns(), waited_for_core_ns()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        for _ in range(LAUNCHES):
            ((weight @ weight).tanh() * weight).sum().backward()
    return (time.perf_counter_ns() - started - (waited_for_core_ns() - waited)) / 1e9


def waited_for_core_ns() -> int:
    """How long this thread was ready to run and did not (proc(5), schedstat)."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1])


if __name__ == "__main__":
    main()
