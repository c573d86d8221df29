"""100,000 live rollouts of 10 turns in one process, against a mock engine.

    python -m tests.bench.rollouts_100k [--tasks 100000] [--turns 10] [--whole 2000]

1. Every rollout goes through the manager: admission, scope, a phase for each turn of engine and environment,
   the sweep for deadlines and silence, the meter of lag. The mock engine answers whole batches after 5 ms.
2. Fewer of them are whole: session, checks, records, an environment that echoes. What they cost has no bar.

`rollouts_2000_real` has real engines and sandboxes, `rollouts_100k_ray` two actors of Ray.

Bars of the first part: at most 5 KB a rollout beyond its tokens, 600 MB, 25 s, p99 of the loop's lag below
200 ms.
"""

import argparse
import asyncio
import resource
import sys
import time
from array import array
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import uvloop

from k25_train.config.rollout_manager import ManagerConfig
from k25_train.rollout.engines.base import EngineState
from k25_train.rollout.manager.loops import calm_collector
from k25_train.rollout.manager.manager import RolloutManager
from k25_train.rollout.manager.scope import Scope
from tests.helpers.rollout_sections import manager_section

MOST_KB, MOST_MB, MOST_S, MOST_LAG_S = 5.0, 600.0, 25.0, 0.2
LATENCY_S = 0.005
AT_ONCE = 500
"""Futures that the engine answers, and rollouts that are begun, in a turn of the loop."""
DRAWN, SEEN = 3, 1
"""Tokens of a turn that are drawn, and observed."""
TOKEN_BYTES = 8
"""Of an id and a log-probability."""


def resident_mb() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 1e6


@dataclass(slots=True)
class MockEngine:
    """Answers all that asked, `LATENCY_S` later."""

    version: int = 0
    asked: list["asyncio.Future[tuple[int, ...]]"] = field(default_factory=list)

    async def generate(self) -> tuple[int, ...]:
        answer: asyncio.Future[tuple[int, ...]] = asyncio.get_running_loop().create_future()
        self.asked.append(answer)
        return await answer

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LATENCY_S)
            batch, self.asked = self.asked, []
            for first in range(0, len(batch), AT_ONCE):
                for answer in batch[first : first + AT_ONCE]:
                    answer.set_result((17, 23, 42))
                await asyncio.sleep(0)

    async def states(self) -> dict[str, EngineState]:
        state = EngineState(
            version=self.version, running=len(self.asked), waiting=0, busy_share=1.0, kv_use=0.5
        )
        return {"mock": state}

    def fenced(self) -> dict[str, str]:
        return {}


async def rollout(scope: Scope, engine: MockEngine, num_turns: int) -> int:
    """One rollout; the number of its tokens."""
    ids, logprobs = array("i", [1, 2, 3, 4]), array("f")
    for _ in range(num_turns):
        with scope.phase("generate", "for an engine"):
            drawn = await engine.generate()
        ids.extend(drawn)
        logprobs.extend((-0.5, -0.5, -0.5))
        with scope.phase("tool", "echo"):
            ids.append(scope.order & 1023)
        scope.count("turns")
    return len(ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Of one run."""

    seconds: float
    spawn_s: float
    most_live: int
    before_mb: float
    peak_mb: float
    lag_p50_s: float
    lag_p99_s: float
    num_tokens: int
    ended: int


async def measure(num_tasks: int, num_turns: int) -> Measured:
    """Run them all; every rollout lives before the first one ends."""
    config: ManagerConfig = replace(manager_section(), max_live=num_tasks)
    engine, before_mb = MockEngine(), resident_mb()
    manager = RolloutManager(config, engines=engine, notice=lambda text: print(text, file=sys.stderr))
    began, most_live = time.perf_counter(), 0
    tasks = []
    for number in range(num_tasks):
        work = manager.run(
            f"task{number}",
            lambda scope: rollout(scope, engine, num_turns),
            source=f"source{number % 3}",
            order=number // 8,
        )
        tasks.append(asyncio.create_task(work))
        if number % AT_ONCE == 0:
            await asyncio.sleep(0)
    while manager.snapshot().live < num_tasks:
        await asyncio.sleep(0)
    spawn_s, most_live = time.perf_counter() - began, manager.snapshot().live
    answering = asyncio.create_task(engine.run())
    results = await asyncio.gather(*tasks)
    seconds = time.perf_counter() - began
    seen = manager.snapshot()
    answering.cancel()
    await manager.close()
    return Measured(
        seconds=seconds,
        spawn_s=spawn_s,
        most_live=most_live,
        before_mb=before_mb,
        peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        lag_p50_s=seen.lag_p50_s,
        lag_p99_s=seen.lag_p99_s,
        num_tokens=sum(results),
        ended=seen.events["ended"],
    )


def mock_part(num_tasks: int, num_turns: int) -> bool:
    """Measure and print; whether the bars hold."""
    calm_collector()
    found = uvloop.run(measure(num_tasks, num_turns))
    expected = num_tasks * (4 + num_turns * (DRAWN + SEEN))
    tokens_mb = num_tasks * num_turns * (DRAWN + SEEN) * TOKEN_BYTES / 1e6
    kb = (found.peak_mb - found.before_mb - tokens_mb) * 1e3 / num_tasks
    print(
        f"{num_tasks:,} rollouts x {num_turns} turns: {found.most_live:,} lived at once (spawned in "
        f"{found.spawn_s:.1f} s), {found.seconds / num_tasks / num_turns * 1e6:.1f} us a turn"
    )
    lines = [
        ("KB a rollout beyond its tokens", kb, MOST_KB),
        ("MB at most", found.peak_mb, MOST_MB),
        ("seconds", found.seconds, MOST_S),
        ("ms of lag, p99", found.lag_p99_s * 1e3, MOST_LAG_S * 1e3),
    ]
    for what, figure, bar in lines:
        print(f"{what:32} {figure:8.1f}   bar {bar:g}   {'holds' if figure <= bar else 'MISSED'}")
    whole = found.num_tokens == expected and found.ended == found.most_live == num_tasks
    print(f"tokens and ends: {'all there' if whole else 'NOT ALL THERE'}")
    return whole and all(figure <= bar for _, figure, bar in lines)


def whole_part(num_tasks: int, num_turns: int) -> None:
    """Measure whole rollouts and print what one costs."""
    # Imports torch, which the first part has no memory for.
    from tests.helpers.mock_rollouts import live

    before_mb, before_s = resident_mb(), time.process_time()
    num_tokens = uvloop.run(live(num_tasks, num_turns, lambda text: print(text, file=sys.stderr)))
    us = (time.process_time() - before_s) / num_tasks / num_turns * 1e6
    kb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before_mb) * 1e3 / num_tasks
    print(
        f"{num_tasks:,} whole rollouts x {num_turns} turns: {us:.0f} us of processor time a turn, at most "
        f"{kb:.0f} KB each with requests in flight, {num_tokens / num_tasks:.0f} tokens each; no bar"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--whole", type=int, default=2_000, metavar="N", help="whole rollouts; 0 for none")
    options: Any = parser.parse_args(arguments)
    holds = mock_part(options.tasks, options.turns)
    if options.whole:
        # Its peak of memory is its own.
        apart = get_context("spawn").Process(target=whole_part, args=(options.whole, options.turns))
        apart.start()
        apart.join()
        holds &= not apart.exitcode
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
