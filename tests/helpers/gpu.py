"""Runs of one rank on a GPU, each in a process that has no platform yet."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tests.helpers.ranks import RankContext, free_port
from tests.helpers.runs import SHRUNK, layout


def in_fresh_process[Result](function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function of an importable module in a new process that has no platform yet."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result(timeout=600)


def alone() -> RankContext:
    return RankContext(rank=0, world_size=1, port=free_port())


def on_gpu(data: Path, run: Path, *more: str) -> list[str]:
    """Overrides of the shrunk smoke run on one GPU, in bfloat16 with Transformer Engine."""
    shrunk = ["experiment=smoke_1gpu", *SHRUNK[1:], *layout()]
    return [*shrunk, f"data.dir={data}", f"run.dir={run}", *more]
