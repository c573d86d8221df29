"""Measures the speed of this rank's device and connections with torch, over NCCL, or gloo on the CPU.

This module, `coordination` and `job` import torch, which the rest of `launch` must not do: they are imported
when the command starts to measure, after everything that a login node can do.
"""

import datetime
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from k25_train.startup.near_gpu import bind_near
from launch.preflight.groups import Round
from launch.preflight.rank import Fault
from launch.preflight.rates import Link

ANSWER_TIMEOUT_S = 60.0
"""Time after which a silent peer is given up; connections are set up within seconds."""
GROUP_TIMEOUTS_S = {"nccl": 900.0, "gloo": ANSWER_TIMEOUT_S}
"""Backend -> timeout of process groups. With NCCL it ends the process, so it is longer than all measurements;
gloo raises, and has no other limit while it connects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Amount of work for a device type, large enough to hide launch overhead."""

    matrix_size: int
    """Number of rows and columns of the matrices."""
    dtype: torch.dtype
    seconds: float
    """Duration of the matrix products: a GPU reduces its clocks only after a while."""
    message_bytes: int
    """Size of a message between two ranks, and of a rank's input of an all-to-all."""
    num_messages: int
    """Number of messages over which a rate is averaged."""


LOADS = {
    "cuda": Load(
        matrix_size=8192, dtype=torch.bfloat16, seconds=3.0, message_bytes=64 * 2**20, num_messages=20
    ),
    "cpu": Load(matrix_size=512, dtype=torch.float32, seconds=0.3, message_bytes=2**20, num_messages=4),
}
COPY_BYTES = 256 * 2**20
NUM_COPIES = 5
BLOCK_SIZE = 20
"""Matrix products per time measurement."""


class StuckError(Exception):
    """Communication did not finish in time, or the library reported an error."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.text)
        self.fault = fault


def prepare_device(device_type: str, local_rank: int) -> torch.device:
    """Select this rank's device, and run near it, as in training. Raises `RuntimeError` if it is a GPU that
    torch does not see."""
    if device_type == "cpu":
        return torch.device("cpu")
    device = torch.device(device_type, local_rank)
    torch.cuda.set_device(device)
    bind_near(device)
    return device


def measure_gemm(device: torch.device, under_load: Callable[[], None]) -> float:
    """TFLOP/s of square matrix products; `under_load` is called once while the device computes."""
    load = LOADS[device.type]
    size = load.matrix_size
    left, right = (torch.randn(size, size, device=device).to(load.dtype) for _ in range(2))
    out = torch.empty_like(left)

    def multiply() -> None:
        for _ in range(BLOCK_SIZE):
            torch.mm(left, right, out=out)

    # Warm up, then multiply for the load's duration, and at least as long as `under_load` takes: nvidia-smi
    # takes longer to answer than a GPU needs for everything that can be queued beforehand.
    multiply()
    _synchronize(device)
    times_s: list[float] = []
    with ThreadPoolExecutor(max_workers=1) as pool:
        reading = pool.submit(under_load)
        while sum(times_s) < load.seconds or not reading.done():
            started_s = time.perf_counter()
            multiply()
            _synchronize(device)
            times_s.append(time.perf_counter() - started_s)
    reading.result()
    return 2 * size**3 * BLOCK_SIZE / statistics.median(times_s) / 1e12


def measure_host_copy(device: torch.device) -> float:
    """GB/s from pinned host memory to a GPU."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    times_s = []
    for _ in range(NUM_COPIES):
        started_s = time.perf_counter()
        target.copy_(source, non_blocking=True)
        _synchronize(device)
        times_s.append(time.perf_counter() - started_s)
    return COPY_BYTES / min(times_s) / 1e9


def open_group(store: dist.Store, rank: int, world_size: int, device: torch.device) -> None:
    """Create the process group of all ranks and connect them with one all-reduce.

    Raises `StuckError` if that fails or does not finish in time.
    """
    doing = Fault(text="connecting all ranks")
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("measure", store),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=GROUP_TIMEOUTS_S[backend]),
        )
        works = [dist.all_reduce(torch.ones(1, device=device), async_op=True)]
    except RuntimeError as error:
        raise StuckError(doing.ended_by(error)) from error
    finish(works, device, doing)


def measure_pairs(rounds: Sequence[Round], device: torch.device) -> Iterator[Link]:
    """Yield the rate of this rank's connection in each round, with traffic in both directions.

    Raises `StuckError` with the number of the round and the peer that does not answer.
    """
    rank = dist.get_rank()
    num_elements = LOADS[device.type].message_bytes // 4
    sent, received = torch.zeros(num_elements, device=device), torch.empty(num_elements, device=device)
    for number, one_round in enumerate(rounds):
        partner = one_round.partner(rank)
        if partner is None:
            continue
        text = f"exchange {number} ({one_round.exchange.value}) with rank {partner}"
        doing = Fault(text=text, peer=partner, exchange=number)
        # The first message sets up the connection and is not timed.
        _exchange(partner, sent, received, 1, doing)
        num_messages = LOADS[device.type].num_messages
        started_s = time.perf_counter()
        _exchange(partner, sent, received, num_messages, doing)
        elapsed_s = time.perf_counter() - started_s
        rate = num_messages * sent.nbytes / elapsed_s / 1e9
        pair = (min(rank, partner), max(rank, partner))
        yield Link(pair=pair, gb_per_s=rate)


def measure_all_to_all(groups: Iterable[Sequence[int]], device: torch.device) -> float:
    """GB/s that this rank sends to others in an all-to-all of its group; every rank is in one of the
    `groups`.

    Raises `StuckError` with the ranks of the group.
    """
    load = LOADS[device.type]
    # 1. Every rank creates all groups, as torch requires, and keeps its own.
    timeout = datetime.timedelta(seconds=GROUP_TIMEOUTS_S[dist.get_backend()])
    for ranks in groups:
        group = dist.new_group(list(ranks), timeout=timeout)
        if dist.get_rank() in ranks:
            own, own_ranks = group, ranks
    # 2. Equal shares for all ranks of the group.
    size = len(own_ranks)
    num_elements = load.message_bytes // 4 // size * size
    sent, received = torch.zeros(num_elements, device=device), torch.empty(num_elements, device=device)
    doing = Fault(text=f"all-to-all of ranks {own_ranks[0]} to {own_ranks[-1]}")

    def exchange(num_times: int) -> None:
        for _ in range(num_times):
            try:
                work = dist.all_to_all_single(received, sent, group=own, async_op=True)
            except RuntimeError as error:
                raise StuckError(doing.ended_by(error)) from error
            finish([work], device, doing)

    # 3. The first exchange sets up connections and is not timed; a rank's own share stays with it.
    exchange(1)
    started_s = time.perf_counter()
    exchange(load.num_messages)
    elapsed_s = time.perf_counter() - started_s
    return load.num_messages * sent.nbytes * (size - 1) / size / elapsed_s / 1e9


def finish(works: Iterable[dist.Work], device: torch.device, doing: Fault) -> None:
    """Wait for communication, at most `ANSWER_TIMEOUT_S`; `doing` describes it. Raises `StuckError`."""
    timeout_s = ANSWER_TIMEOUT_S
    deadline = time.monotonic() + timeout_s
    try:
        for work in works:
            if device.type == "cuda":
                work.wait()
            else:
                work.wait(datetime.timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise StuckError(doing.ended_by(error)) from error
    # On a GPU, wait() only orders streams. The host polls, since it would hang in a synchronization.
    while device.type == "cuda" and not torch.cuda.current_stream(device).query():
        if time.monotonic() > deadline:
            raise StuckError(replace(doing, text=f"{doing.text}: no answer in {timeout_s:g} s"))
        time.sleep(1e-4)


def _exchange(
    partner: int, sent: torch.Tensor, received: torch.Tensor, num_messages: int, doing: Fault
) -> None:
    for _ in range(num_messages):
        operations = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
        try:
            works = dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            raise StuckError(doing.ended_by(error)) from error
        finish(works, sent.device, doing)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
