"""How long verdicts take, next to 5 ms at the 99th percentile; how many sandboxes start a second, next to 80.

`python -m tests.bench.rewards`: each rule on answers of ordinary size (20 boxes or points, polygons of 12
vertices, 1,000 characters), judged in this process and through a worker; then programs in sandboxes, two at a
time. A minute on a quiet machine. Ends with 1 where a bar is missed; the sandboxes are left out without
bubblewrap.
"""

import asyncio
import json
import random
import shutil
import sys
import time

import numpy as np

from k25_train.environments.base import Status
from k25_train.environments.sandboxes.one_shot import open_sandbox
from k25_train.rl.rewards.text_rules import apply_rule
from k25_train.rl.rewards.workers import RuleWorkers
from tests.helpers.sandboxes import LIMITS, PYTHON

BAR_MS = 5.0
BAR_SANDBOXES = 80.0
CASES = 500
SANDBOXES = 200


def main() -> int:
    """Print every rule's figures, then the bars."""
    rng = random.Random(1)
    cases = {rule: [draw(rng) for _ in range(CASES)] for rule, draw in DRAWS.items()}
    worst = 0.0
    for rule, drawn in cases.items():
        here = [_seconds(lambda rule=rule, case=case: apply_rule(rule, *case)) for case in drawn]
        through = asyncio.run(_through_worker(rule, drawn))
        p50, p99 = np.percentile(np.array(here) * 1e3, [50, 99])
        worker = float(np.percentile(np.array(through) * 1e3, 50))
        worst = max(worst, float(p99))
        print(f"{rule:9} p50 {p50:6.2f} ms, p99 {p99:6.2f} ms; through a worker p50 {worker:6.2f} ms")
    per_s = asyncio.run(_sandboxes()) if shutil.which("bwrap") else None
    if per_s is not None:
        kept = "kept" if per_s >= BAR_SANDBOXES else "MISSED"
        print(f"{per_s:.0f} sandboxes a second, bar {BAR_SANDBOXES:.0f}: {kept}")
    print(f"slowest p99 {worst:.2f} ms, bar {BAR_MS:.0f} ms: {'kept' if worst <= BAR_MS else 'MISSED'}")
    return int(worst > BAR_MS or (per_s is not None and per_s < BAR_SANDBOXES))


def _seconds(call: object) -> float:
    began = time.process_time()
    assert callable(call)
    assert call().status is Status.SCORED
    return time.process_time() - began


async def _through_worker(rule: str, cases: list[tuple[str, object]]) -> list[float]:
    workers = RuleWorkers(1)
    seconds = []
    try:
        await workers.apply(rule, *cases[0])
        for case in cases:
            began = time.monotonic()
            await workers.apply(rule, *case)
            seconds.append(time.monotonic() - began)
    finally:
        await workers.close()
    return seconds


async def _sandboxes() -> float:
    sandbox = open_sandbox(LIMITS)
    began = time.monotonic()
    for _ in range(SANDBOXES // 2):
        await asyncio.gather(*(sandbox.run(["true"], {}) for _ in range(2)))
    per_s = SANDBOXES / (time.monotonic() - began)
    began = time.monotonic()
    await sandbox.run([*PYTHON, "pass"], {})
    print(f"sandbox with Python: {(time.monotonic() - began) * 1e3:.0f} ms")
    return per_s


def _boxes(rng: random.Random) -> tuple[str, object]:
    drawn = [[[x, y, x + rng.random(), y + rng.random()] for x, y in _pairs(rng, 20)] for _ in range(2)]
    return json.dumps(drawn[0]), {"boxes": drawn[1], "iou_floor": 0.1}


def _points(rng: random.Random) -> tuple[str, object]:
    return json.dumps(_pairs(rng, 20)), {"points": _pairs(rng, 20), "sigma": 0.1}


def _polygons(rng: random.Random) -> tuple[str, object]:
    return json.dumps([_pairs(rng, 12)]), {"polygons": [_pairs(rng, 12)]}


def _ocr(rng: random.Random) -> tuple[str, object]:
    found, expected = ("".join(rng.choices("abcdefgh ", k=1_000)) for _ in range(2))
    return found, {"text": expected}


def _number(rng: random.Random) -> tuple[str, object]:
    return f"{'So it goes on. ' * 60}\n\\boxed{{{rng.randint(0, 999)}}}", {"answer": rng.randint(0, 999)}


def _pairs(rng: random.Random, count: int) -> list[list[float]]:
    return [[rng.random(), rng.random()] for _ in range(count)]


DRAWS = {"boxes": _boxes, "points": _points, "polygons": _polygons, "ocr": _ocr, "number": _number}

if __name__ == "__main__":
    sys.exit(main())
