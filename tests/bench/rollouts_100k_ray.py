"""100,000 live rollouts of 10 turns through Ray: two actors, one call each, coroutines inside.

    python -m tests.bench.rollouts_100k_ray [--tasks 100000] [--turns 10] [--shards 2]

Each shard does its share of what tests.bench.rollouts_100k does in one process. Meanwhile its control group,
which has threads of its own, is asked how it is, over and over: an answer that waits for rollouts is the
deadlock of an actor whose places are all taken.

Bars: 25 s from the first call to the last result, at most 5 KB a rollout beyond its tokens, 600 MB a shard,
p99 of the loops' lag below 200 ms, no control call above 2 s.
"""

import argparse
import dataclasses
import os
import sys
import time
from typing import Any

from tests.bench.rollouts_100k import (
    DRAWN,
    MOST_KB,
    MOST_LAG_S,
    MOST_MB,
    MOST_S,
    SEEN,
    TOKEN_BYTES,
    Measured,
    measure,
)

MOST_CONTROL_S = 2.0
POLL_S = 0.1


class Shard:
    """What an actor does."""

    def roll_out(self, num_tasks: int, num_turns: int) -> dict[str, Any]:
        """Have so many rollouts live and end on an event loop of this call; `Measured` as a mapping."""
        import uvloop

        from k25_train.rollout.manager.loops import calm_collector

        calm_collector()
        return dataclasses.asdict(uvloop.run(measure(num_tasks, num_turns)))

    def pid(self) -> int:
        """Of the control group: answers while the call above goes on."""
        return os.getpid()


def through_ray(shares: list[int], num_turns: int) -> tuple[list[Measured], float, list[float]]:
    """What each shard has measured, the seconds of all, and those of each control call."""
    import ray

    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        num_cpus=len(shares),
        object_store_memory=80 * 2**20,
    )
    try:
        actor = ray.remote(concurrency_groups={"control": 2})(Shard)
        shards = [actor.remote() for _ in shares]
        asked = [shard.pid.options(concurrency_group="control") for shard in shards]
        ray.get([call.remote() for call in asked])
        began, took = time.perf_counter(), list[float]()
        waiting = [
            shard.roll_out.remote(share, num_turns) for shard, share in zip(shards, shares, strict=True)
        ]
        results, left = list(waiting), list(waiting)
        while left:
            for call in asked:
                at = time.perf_counter()
                ray.get(call.remote(), timeout=60)
                took.append(time.perf_counter() - at)
            _, left = ray.wait(left, num_returns=len(left), timeout=POLL_S)
        found = [Measured(**each) for each in ray.get(results)]
        return found, time.perf_counter() - began, took
    finally:
        ray.shutdown()


def main(arguments: list[str] | None = None) -> int:
    """Run it; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--shards", type=int, default=2)
    options = parser.parse_args(arguments)
    shares = [
        options.tasks // options.shards + (number < options.tasks % options.shards)
        for number in range(options.shards)
    ]
    found, seconds, control = through_ray(shares, options.turns)
    tokens_mb = [share * options.turns * (DRAWN + SEEN) * TOKEN_BYTES / 1e6 for share in shares]
    kb = max(
        (each.peak_mb - each.before_mb - mb) * 1e3 / share
        for each, mb, share in zip(found, tokens_mb, shares, strict=True)
    )
    live, middle = sum(each.most_live for each in found), sorted(control)[len(control) // 2] * 1e3
    print(f"{options.tasks:,} rollouts x {options.turns} turns, {len(shares)} shards: {live:,} lived at once")
    print(f"{len(control):,} control calls meanwhile, median {middle:.1f} ms")
    lines = [
        ("KB a rollout beyond its tokens", kb, MOST_KB),
        ("MB of a shard at most", max(each.peak_mb for each in found), MOST_MB),
        ("seconds", seconds, MOST_S),
        ("ms of lag, p99", max(each.lag_p99_s for each in found) * 1e3, MOST_LAG_S * 1e3),
        ("ms of a control call at most", max(control) * 1e3, MOST_CONTROL_S * 1e3),
    ]
    for what, figure, bar in lines:
        print(f"{what:32} {figure:8.1f}   bar {bar:g}   {'holds' if figure <= bar else 'MISSED'}")
    expected = options.tasks * (4 + options.turns * (DRAWN + SEEN))
    whole = sum(each.num_tokens for each in found) == expected and live == options.tasks
    print(f"tokens and ends: {'all there' if whole else 'NOT ALL THERE'}")
    return 0 if whole and all(figure <= bar for _, figure, bar in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
