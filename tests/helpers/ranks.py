"""Run a function on several ranks, cheaply and without leaving anything behind.

`run_ranks(function, world_size)` forks its ranks from a server process that has imported torch and
megatron-core once and has computed nothing yet (a process that has used its thread pools must not be forked).
A rank therefore starts in milliseconds instead of the many seconds that the imports take.

Ranks that compute on GPUs are started from nothing instead: the server has the CPU's platform, which a
process keeps, and CUDA does not survive a fork. Each takes the GPU of its number, since NCCL refuses two on
one.

The function must live in an importable module; it gets a `RankContext` and its result, which must be
picklable, comes back. If a rank fails, the others are ended and the traceback of every failed rank is raised.
"""

import contextlib
import fcntl
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOADED = "tests.helpers.rank_imports"
PORTS = range(20_000, 32_000)
"""Ports of tests; Linux takes those of outgoing connections from 32768 on."""


class RankError(AssertionError):
    """At least one rank raised, died, or did not finish in time."""


@dataclass(frozen=True, slots=True)
class RankContext:
    """What a rank knows when it starts."""

    rank: int
    world_size: int
    port: int
    device: str = "cpu"

    def environment(self) -> dict[str, str]:
        """The variables torchrun would set."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            "OMP_NUM_THREADS": "1",
        }


def run_ranks[Result](
    function: Callable[..., Result],
    world_size: int,
    *arguments: Any,
    timeout_s: float = 120.0,
    device: str = "cpu",
) -> list[Result]:
    """Call `function(context, *arguments)` on `world_size` ranks and return their results by rank.

    Raises `RankError` with the traceback of every rank that failed, or naming the ranks that were still
    running after `timeout_s`. No rank outlives the call. With `device="cuda"` each rank has a GPU.
    """
    context = start_context(device)
    port = free_port()
    processes, pipes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main,
            args=(RankContext(rank, world_size, port, device), sender, function, arguments),
            daemon=True,
        )
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    try:
        return _collect(pipes, timeout_s)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def start_context(device: str) -> Any:
    """How ranks on a device are started."""
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    return context


def _collect(pipes: list[Connection], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = dict(enumerate(pipes))
    # After a first failure the others get a moment to report theirs: the cause may be on another rank.
    while waiting and (remaining := deadline - time.monotonic()) > 0:
        ready = wait(list(waiting.values()), timeout=remaining)
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            try:
                succeeded, value = pickle.loads(waiting.pop(rank).recv_bytes())
            except EOFError:
                succeeded, value = False, "died without a traceback (killed, or a crash in native code)"
            if succeeded:
                results[rank] = value
            else:
                failures[rank] = value
                deadline = min(deadline, time.monotonic() + 2.0)
    if failures:
        texts = (f"rank {rank}: {text}" for rank, text in sorted(failures.items()))
        raise RankError("\n".join(["ranks failed:", *texts]))
    if waiting:
        raise RankError(f"ranks {sorted(waiting)} still running after {timeout_s:g} s")
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    context: RankContext, sender: Connection, function: Callable[..., Any], arguments: Any
) -> None:
    import torch

    os.environ.update(context.environment())
    torch.set_num_threads(1)
    try:
        # Plain pickle copies tensors; the connection's own would leave them in the memory of this process.
        sender.send_bytes(pickle.dumps((True, function(context, *arguments))))
    except BaseException:
        # The peers may be gone already; the parent then reads the end of the pipe.
        with contextlib.suppress(OSError):
            sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        sender.close()
        # Skips the destructors of process groups, which wait for peers that may have failed.
        os._exit(0)


def free_port() -> int:
    """A TCP port that nothing listens on and that no other test process of this user gets in the next while.

    Ports are handed out in turn from below the range that the kernel takes for outgoing connections: a port
    that the kernel picked may become the source of somebody's connection before the ranks listen on it.
    """
    counter = Path(tempfile.gettempdir()) / f"k25_test_ports.{os.getuid()}"
    with counter.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        latest = int(file.read() or 0)
        for offset in range(1, len(PORTS) + 1):
            index = (latest + offset) % len(PORTS)
            if _is_free(PORTS[index]):
                file.truncate(0)
                file.write(str(index))
                return PORTS[index]
    raise RankError(f"no port from {PORTS[0]} to {PORTS[-1]} is free")


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True
