"""Speed of this rank's device and of its connections, measured with torch over NCCL, or gloo on the CPU.

This module, `meeting` and `job` import torch, which the rest of `launch` must not: they are imported when the
command starts to measure, after everything that a login node can do.
"""

import datetime
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from launch.preflight.groups import Round
from launch.preflight.measurements import Fault
from launch.preflight.rates import Link

ANSWER_TIMEOUT_S = 60.0
"""A peer that does not answer a message for so long never will; connections are set up within seconds."""
GROUP_TIMEOUTS_S = {"nccl": 900.0, "gloo": ANSWER_TIMEOUT_S}
"""After which torch gives up. NCCL then ends the process, so this comes when all here is done; gloo raises,
and has no other limit while it connects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much work a device gets, so that launching it takes no share of the time."""

    matrix_size: int
    """Rows and columns of the matrices multiplied."""
    dtype: torch.dtype
    seconds: float
    """For which matrices are multiplied: a GPU's clocks fall only after a while."""
    message_bytes: int
    """Size of what two ranks send each other, and of what a rank sends in an all-to-all."""
    num_messages: int
    """Messages over which a rate is averaged."""


LOADS = {
    "cuda": Load(
        matrix_size=8192, dtype=torch.bfloat16, seconds=3.0, message_bytes=64 * 2**20, num_messages=20
    ),
    "cpu": Load(matrix_size=512, dtype=torch.float32, seconds=0.3, message_bytes=2**20, num_messages=4),
}
COPY_BYTES = 256 * 2**20
BLOCK = 20
"""Matrix products between two looks at the clock."""


class StuckError(Exception):
    """Communication did not end, or the library gave up on it."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.text)
        self.fault = fault


def prepare_device(device_type: str, local_rank: int) -> torch.device:
    """This rank's device. Raises `RuntimeError` if it is a GPU that torch does not see."""
    if device_type == "cpu":
        return torch.device("cpu")
    device = torch.device(device_type, local_rank)
    torch.cuda.set_device(device)
    return device


def measure_gemm(device: torch.device, under_load: Callable[[], None]) -> float:
    """TFLOP/s of square matrix products; `under_load` is called once while the device computes."""
    load = LOADS[device.type]
    size = load.matrix_size
    left, right = (torch.randn(size, size, device=device).to(load.dtype) for _ in range(2))
    out = torch.empty_like(left)

    def multiply() -> None:
        for _ in range(BLOCK):
            torch.mm(left, right, out=out)

    multiply()
    _synchronize(device)
    times_s: list[float] = []
    # nvidia-smi takes longer to answer than a GPU to finish what can be queued before.
    with ThreadPoolExecutor(max_workers=1) as pool:
        reading = pool.submit(under_load)
        while sum(times_s) < load.seconds or not reading.done():
            started_s = time.perf_counter()
            multiply()
            _synchronize(device)
            times_s.append(time.perf_counter() - started_s)
    reading.result()
    return 2 * size**3 * BLOCK / statistics.median(times_s) / 1e12


def measure_host_copy(device: torch.device) -> float:
    """GB/s from pinned host memory to a GPU."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    times_s = []
    for _ in range(5):
        started_s = time.perf_counter()
        target.copy_(source, non_blocking=True)
        _synchronize(device)
        times_s.append(time.perf_counter() - started_s)
    return COPY_BYTES / min(times_s) / 1e9


def open_group(store: dist.Store, rank: int, world_size: int, device: torch.device) -> None:
    """Start the process group of all ranks and connect them once.

    Raises `StuckError` if that fails or does not end.
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
    """Rate of this rank's connection in each round, both directions at once.

    Raises `StuckError` with the number of the round and the peer that does not answer.
    """
    rank = dist.get_rank()
    num_elements = LOADS[device.type].message_bytes // 4
    sent, received = torch.zeros(num_elements, device=device), torch.empty(num_elements, device=device)
    for number, meeting in enumerate(rounds):
        partner = meeting.partner(rank)
        if partner is None:
            continue
        text = f"exchange {number} ({meeting.exchange.value}) with rank {partner}"
        doing = Fault(text=text, peer=partner, exchange=number)
        _exchange(partner, sent, received, 1, doing)
        num_messages = LOADS[device.type].num_messages
        started_s = time.perf_counter()
        _exchange(partner, sent, received, num_messages, doing)
        elapsed_s = time.perf_counter() - started_s
        rate = num_messages * sent.nbytes / elapsed_s / 1e9
        pair = (min(rank, partner), max(rank, partner))
        yield Link(pair=pair, gb_per_s=rate)


def measure_all_to_all(groups: Iterable[Sequence[int]], device: torch.device) -> float:
    """GB/s that leave this rank in an all-to-all of its group; every rank is in one of the `groups`.

    Raises `StuckError` with the ranks of the group.
    """
    load = LOADS[device.type]
    timeout = datetime.timedelta(seconds=GROUP_TIMEOUTS_S[dist.get_backend()])
    for ranks in groups:
        group = dist.new_group(list(ranks), timeout=timeout)
        if dist.get_rank() in ranks:
            own, own_ranks = group, ranks
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

    exchange(1)
    started_s = time.perf_counter()
    exchange(load.num_messages)
    elapsed_s = time.perf_counter() - started_s
    return load.num_messages * sent.nbytes * (size - 1) / size / elapsed_s / 1e9


def finish(works: Iterable[dist.Work], device: torch.device, doing: Fault) -> None:
    """Wait for communication, at most `ANSWER_TIMEOUT_S`. Raises `StuckError` saying what was being done."""
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
    # On a GPU waiting only orders streams; the host would hang in a synchronization, so it looks instead.
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
