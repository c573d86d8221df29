"""The multi-rank harness itself: results, failures, deaths, hangs, and nothing left behind."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.ranks import RankContext, RankError, run_ranks

pytestmark = pytest.mark.distributed


def sum_of_ranks(context: RankContext) -> float:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([float(context.rank)])
    dist.all_reduce(total)
    return total.item()


def raise_on_rank_one(context: RankContext) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if context.rank == 1:
        raise ValueError("rank one is unhappy")
    dist.barrier()


def die_on_rank_one(context: RankContext) -> None:
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def note_pid_and_sleep(context: RankContext, folder: str) -> None:
    with open(f"{folder}/{context.rank}", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)


def platform_of(context: RankContext) -> tuple[str, str, bool, bool]:
    """Device and local rank, whether the platform of the CPU is in place, and whether CUDA was started."""
    import torch

    has_shim = torch.cuda.Stream.__module__.startswith("parallel")
    return context.device, os.environ["LOCAL_RANK"], has_shim, torch.cuda.is_initialized()


def test_ranks_on_gpus_start_with_stock_torch_and_no_rank_inherits_cuda() -> None:
    # No GPU is needed to see it: nothing here computes.
    assert run_ranks(platform_of, 2, device="cuda") == [("cuda", str(n), False, False) for n in range(2)]
    assert run_ranks(platform_of, 1) == [("cpu", "0", True, False)]


def test_results_come_back_by_rank() -> None:
    assert run_ranks(sum_of_ranks, 3) == [3.0, 3.0, 3.0]


def test_the_failing_ranks_traceback_is_raised() -> None:
    with pytest.raises(RankError, match="rank one is unhappy"):
        run_ranks(raise_on_rank_one, 2)


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(RankError, match="rank 1: died without a traceback"):
        run_ranks(die_on_rank_one, 2)


def test_hanging_ranks_are_named_and_none_outlives_the_call(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"ranks \[0, 1\] still running after 4 s"):
        run_ranks(note_pid_and_sleep, 2, str(tmp_path), timeout_s=4)
    pids = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
