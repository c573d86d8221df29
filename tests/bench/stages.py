"""`python -m tests.bench.stages [--skip-long]`: the chain of shrunk stages, whole, and killed.

1. The whole chain (`make stages`): its time, held-out losses before and after each stage, needles found.
2. A short form of it, undisturbed, and once more with every stage killed at a random step, with its ranks,
   and the chain started again: losses of every step have to be the same.

The last line is the verdict; the status is 1 where a bar is missed.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from k25_train.recipes.chain import load_chain
from k25_train.recipes.closing import Result, results_of
from k25_train.recipes.composed import compose_chain
from tests.helpers.interrupted_runs import rows, without_times

LIMIT_S = 12 * 60.0
VISION_STAGES = ("vit", "projector", "joint")
RUNS = Path("runs/bench_stages")
SHORT = {
    "lm": 8,
    "base": 8,
    "vit": 8,
    "projector": 8,
    "joint": 8,
}
"""Stage -> steps of the short form. The long stages are left out: they are runs like the others."""
SHORTER = (
    "train.eval_interval=8 checkpoint.interval=2 optim.warmup=2 optim.decay=2 train.eval_sequences=16".split()
)


def main() -> int:
    """Run both parts; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--skip-long", action="store_true", help="only the short form, killed")
    parser.add_argument("--seed", type=int, default=0, help="of the steps that stages are killed at")
    options = parser.parse_args()
    missed = [] if options.skip_long else whole_chain()
    missed += killed_chain(random.Random(options.seed))
    print("MISSED: " + "; ".join(missed) if missed else "all bars are met")
    return 1 if missed else 0


def whole_chain() -> list[str]:
    """Run the chain in full; returns what is missed."""
    folder = RUNS / "whole"
    shutil.rmtree(folder, ignore_errors=True)
    started_s = time.monotonic()
    subprocess.run(command(folder, []), check=True)
    took_s = time.monotonic() - started_s
    chain = load_chain("smoke", [f"dir={folder}"])
    results = {each.name: each for each in results_of(chain, compose_chain(chain))}
    missed = [f"took {took_s:.0f} s, limit {LIMIT_S:.0f} s"] if took_s > LIMIT_S else []
    print(f"whole chain: {took_s:.0f} s, {took_s / LIMIT_S:.2f} of the limit")
    for name in VISION_STAGES:
        before, after = results[name].before_and_after("eval_caption_loss") or (0.0, 0.0)
        print(f"  {name}: held-out captions {before:.3f} -> {after:.3f}")
        if not after < before:
            missed.append(f"held-out captions do not fall in {name}")
    return missed + needles_missed(results, chain.needles.after if chain.needles else ())


def needles_missed(results: dict[str, Result], after: tuple[str, ...]) -> list[str]:
    """What is missed of needles: at each length more have to be found behind the long stages than before."""
    missed = []
    first, last = results[after[0]].needles, results[after[-1]].needles
    for length in sorted(first):
        print(f"  needles in {length:,} tokens: {first[length].found:.1%} -> {last[length].found:.1%}")
        if not last[length].found > first[length].found:
            missed.append(f"no more needles are found in {length:,} tokens")
    return missed


def killed_chain(chance: random.Random) -> list[str]:
    """Run the short form twice, the second time with a kill in each stage; returns what is missed."""
    settings = [f"{stage}.{each}" for stage in SHORT for each in SHORTER]
    settings += [f"{stage}.train.steps={steps}" for stage, steps in SHORT.items()]
    settings += [f"{stage}.data.schedule={{}}" for stage in SHORT]
    path = RUNS / "short.yaml"
    RUNS.mkdir(parents=True, exist_ok=True)
    path.write_text(short_form(Path("conf/chain/smoke.yaml").read_text(encoding="utf-8")), encoding="utf-8")
    quiet, killed = RUNS / "quiet", RUNS / "killed"
    for folder in (quiet, killed):
        shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(command(quiet, settings, path), check=True, stdout=subprocess.DEVNULL)
    for stage, steps in SHORT.items():
        kill_at(command(killed, settings, path), killed / stage, chance.randrange(1, steps))
    subprocess.run(command(killed, settings, path), check=True, stdout=subprocess.DEVNULL)
    differing = [
        stage for stage in SHORT if without_times(rows(quiet / stage)) != without_times(rows(killed / stage))
    ]
    print(f"killed in each of {len(SHORT)} stages: {len(SHORT) - len(differing)} end in the same losses")
    return [f"other losses after a kill in {', '.join(differing)}"] if differing else []


def short_form(chain: str) -> str:
    """The chain without needles and long stages."""
    stages = chain[chain.index("stages:") : chain.index("  midtrain_1k:")]
    return f"dir: runs/short\n{stages}"


def command(folder: Path, settings: list[str], chain: Path | None = None) -> list[str]:
    """The chain's command."""
    name = "smoke" if chain is None else str(chain)
    return [sys.executable, "-m", "k25_train.recipes.stages", f"chain={name}", f"dir={folder}", *settings]


def kill_at(arguments: list[str], stage: Path, step: int) -> None:
    """Start the chain, and kill it and everything that it has started once a stage has reached a step."""
    chain = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    while chain.poll() is None and reached(stage) < step:
        time.sleep(0.05)
    print(f"  killed in {stage.name} behind step {reached(stage)}", flush=True)
    for pid in [*descendants(chain.pid), chain.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    chain.wait()


def reached(stage: Path) -> int:
    """The last step of a run that has a row."""
    try:
        return len((stage / "metrics.jsonl").read_bytes().splitlines()) - 1
    except FileNotFoundError:
        return -1


def descendants(parent: int) -> list[int]:
    """All processes that a process has started, directly or not."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found = [parent]
    for pid in found:
        found += [child for child, of in parents.items() if of == pid]
    return found[1:]


if __name__ == "__main__":
    sys.exit(main())
