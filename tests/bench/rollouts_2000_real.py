"""2,000 live rollouts against the engine in process and real sandboxes, through the manager.

    python -m tests.bench.rollouts_2000_real [--rollouts 2000]

All live at once; each draws 4 tokens, runs a command on them in a bubblewrap sandbox of its own, sees what it
printed, and draws 4 more. 8 sandboxes are open at a time. Bars: every one ends, with its own sandbox's answer
and 8 tokens; no sandbox is left; p99 of the loop's lag below 200 ms.
"""

import argparse
import asyncio
import sys
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import uvloop

from k25_train.environments.sandboxes.base import Sandboxes, SandboxSpec
from k25_train.environments.sandboxes.opening import open_sandboxes
from k25_train.rollout.engines.base import Request, Sampling
from k25_train.rollout.engines.pool import EnginePool
from k25_train.rollout.manager.loops import calm_collector
from k25_train.rollout.manager.manager import RolloutManager
from k25_train.rollout.manager.scope import Scope
from tests.bench.rollout_engine import tiny_model
from tests.helpers.family_cases import LIMITS
from tests.helpers.hf_reference import random_checkpoint
from tests.helpers.rollout_sections import manager_section
from tests.helpers.sampled_engine import build_engine, forbidden_ids, push

NEW, SLOTS, OPEN = 4, 64, 8
MOST_LAG_S = 0.2


async def rollout(
    scope: Scope, pool: EnginePool, sandboxes: Sandboxes, sampling: Sampling, number: int
) -> tuple[str, int]:
    """One; what its sandbox said of the tokens that it had drawn, and how many it has drawn in the end."""
    ids = tuple(2 + (number + each) % 50 for each in range(16))

    async def draw() -> tuple[int, ...]:
        with scope.phase("generate", "for an engine"):
            request = Request(key=scope.name, prompt_ids=ids, sampling=replace(sampling, seed=number))
            drawn = (await pool.generate(request)).token_ids
        scope.count("turns")
        return tuple(int(token) for token in drawn)

    first = await draw()
    with scope.phase("sandbox", "waits for one"):
        session = await sandboxes.open(SandboxSpec(name=scope.name))
    try:
        with scope.phase("tool", session.name):
            done = await session.run(
                ["sh", "-c", f"echo {number}:$(({'+'.join(map(str, first))}))"], timeout_s=60
            )
    finally:
        await scope.teardown(session.close(), session.name)
    said = done.stdout.decode().strip()
    ids += first + tuple(2 + token % 50 for token in done.stdout)
    second = await draw()
    assert said == f"{number}:{sum(first)}", (said, done)
    return said, len(first) + len(second)


async def measure(num_rollouts: int) -> bool:
    """Run them, print, and say whether the bars hold."""
    # 1. Engine and sandboxes.
    model = tiny_model()
    engine = build_engine(model, max_running=SLOTS)
    await push(engine, await asyncio.to_thread(random_checkpoint, model), 0)
    pool = EnginePool.of([engine], 60.0)
    pool.version = 0
    sandboxes = open_sandboxes("bubblewrap", LIMITS, run="bench", most=OPEN, secret=())
    await sandboxes.reconcile()
    config = replace(manager_section(), max_live=num_rollouts)
    manager = RolloutManager(config, engines=pool, notice=print)
    sampling = Sampling(
        max_tokens=NEW, temperature=1.0, seed=0, stop_ids=(), forbidden_ids=forbidden_ids(model)
    )
    calm_collector()
    # 2. All of them.
    began, most_live = time.perf_counter(), 0
    tasks = [
        asyncio.create_task(
            manager.run(
                f"rollout {number}",
                lambda scope, n=number: rollout(scope, pool, sandboxes, sampling, n),
                source="bench",
                order=number,
            )
        )
        for number in range(num_rollouts)
    ]
    while not all(task.done() for task in tasks):
        most_live = max(most_live, manager.snapshot().live)
        await asyncio.sleep(0.05)
    seconds, seen = time.perf_counter() - began, manager.snapshot()
    results: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
    await manager.close()
    await sandboxes.close()
    left = await open_sandboxes("bubblewrap", LIMITS, run="bench", most=OPEN, secret=()).reconcile()
    await engine.close()
    # 3. What came of it.
    faults = Counter(
        f"{type(each).__name__}: {each}"[:100] for each in results if isinstance(each, BaseException)
    )
    whole = sum(1 for each in results if isinstance(each, tuple) and each[1] == 2 * NEW)
    parts = ", ".join(f"{name} {share:,.0f} s" for name, share in seen.phase_seconds.items() if share >= 1)
    print(f"{num_rollouts:,} rollouts in {seconds:.0f} s, {most_live:,} lived at once; in phases: {parts}")
    print(f"faults: {dict(faults) or 'none'}; sandboxes that were left: {left}")
    print(
        f"whole {whole:,}   bar {num_rollouts:,}; live at once {most_live:,}   bar {num_rollouts:,}; "
        f"lag p99 {seen.lag_p99_s * 1e3:.0f} ms   bar {MOST_LAG_S * 1e3:.0f}"
    )
    return whole == most_live == num_rollouts and not left and seen.lag_p99_s < MOST_LAG_S


def main(arguments: list[str] | None = None) -> int:
    """Measure; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=2_000)
    options = parser.parse_args(arguments)
    return 0 if uvloop.run(measure(options.rollouts)) else 1


if __name__ == "__main__":
    sys.exit(main())
