"""vLLM on the CPU as an engine: the push of new weights, and responses per second.

    make engine && python -m tests.bench.vllm_engine

A short run is trained and served by `k25-rollout serve`. A push is pause, reload of all weights through the
worker extension, caches, label and going on; its bar is a second. Speed is for the record: it depends on the
machine and on who else uses it.
"""

import asyncio
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from k25_train.rollout.engines.base import PauseMode, ProbeSequence
from k25_train.rollout.engines.http_engine import HttpEngine
from k25_train.rollout.engines.vllm.client import connect_vllm
from tests.helpers.engine_subjects import LIMITS
from tests.helpers.vllm_engine import ServedRun, served_run

MOST_PUSH_S = 1.0
PUSHES = 6
IN_FLIGHT = (1, 8, 64)
NUM_TOKENS = 64


async def push_s(engine: HttpEngine, folder: Path) -> float:
    """Seconds in which the engine does not generate for new weights."""
    version = (await engine.state()).version + 1
    await engine.stage(folder, version)
    start = time.perf_counter()
    await engine.pause(PauseMode.keep)
    await engine.commit(version)
    await engine.resume()
    return time.perf_counter() - start


async def tokens_per_s(engine: HttpEngine, run: ServedRun, count: int) -> float:
    """With so many responses asked for at once."""
    request = run.subject().request(max_tokens=NUM_TOKENS, forbidden_ids=(run.ids.media_pad,))
    requests = [
        replace(request, key=f"{number}", sampling=replace(request.sampling, seed=number))
        for number in range(count)
    ]
    start = time.perf_counter()
    found = await asyncio.gather(*(engine.generate(each) for each in requests))
    return sum(len(each.token_ids) for each in found) / (time.perf_counter() - start)


async def measure(run: ServedRun) -> bool:
    """Print all figures; whether the bars are kept."""
    engine = await connect_vllm(run.url, run.ids, replace(LIMITS, max_running=64))
    try:
        sequence = ProbeSequence(tuple(range(40, 80)), ())
        (before,) = await engine.probe([sequence])
        seconds = [await push_s(engine, (run.other, run.folder)[turn % 2]) for turn in range(PUSHES)]
        (after,) = await engine.probe([sequence])
        for count in IN_FLIGHT:
            print(f"{count:3} at once: {await tokens_per_s(engine, run, count):,.0f} tokens/s")
    finally:
        await engine.close()
    gap = float(np.abs(before - after).max())
    print(f"log-probabilities after {PUSHES} pushes, there and back: {gap:.1e} from before")
    push = sorted(seconds)[len(seconds) // 2]
    print(f"push: {min(seconds):.2f} to {max(seconds):.2f} s, median {push:.2f} s (bar {MOST_PUSH_S:g} s)")
    return push <= MOST_PUSH_S and gap <= 1e-6


def main() -> int:
    """Serve and measure; returns the exit status."""
    with tempfile.TemporaryDirectory() as work, served_run(Path(work)) as run:
        return 0 if asyncio.run(measure(run)) else 1


if __name__ == "__main__":
    sys.exit(main())
