"""Whether reinforcement learning learns, and Toggle saves tokens: the shrunk model on sums of digits.

    python -m tests.bench.rl_toggle [--dir FOLDER] [--seeds N] [--jobs N] [--parts toggle,learning,rate]

    toggle      fine-tuned once; then for each seed with r alone and with Toggle. Held-out tasks: tokens per
                answer against those after fine-tuning and without Toggle, accuracy; both curves are drawn
    learning    fine-tuned further by a demonstrator who is often wrong; then reinforced, and as a control
                with the rewards of each group shuffled among its responses
    rate        Toggle at ten times the rate: how it fails, for the record; there is no bar

Needs the checkpoint of `make smoke` and `datasets/chat`. Runs are kept in FOLDER: what is finished is not run
again, what was interrupted goes on. Ends non-zero if a bar is missed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from k25_train.compose.resolve import compose
from k25_train.metrics.rl_plot import Arm, plot_arms
from k25_train.metrics.sinks import number
from tests.helpers.bench_runs import BenchRuns, Job

MIN_SAVED, MIN_SAVED_BY_TOGGLE, MAX_LOST = 0.30, 0.15, 0.01
MIN_GAINED, MOST_BEFORE = 0.2, 0.6
STEPS, LEARNING_STEPS = 20, 25
HELDOUT = 512
"""Tasks of an evaluation: half a point of standard error at an accuracy of 0.99."""
RATE_FACTOR = 10
LEARNING_RATE = ("optim.lr=5.0e-4", "optim.min_lr=5.0e-4")
"""Of what has more to learn."""
FREE = "algorithm.toggle.enabled=false"
KINDS = {"r": FREE, "toggle": "algorithm.toggle.enabled=true"}
LABELS = {"r": "reward alone", "toggle": "with Toggle"}
PARTS = ("toggle", "learning", "rate")
SMOKE = "runs/smoke/checkpoints/step_160"
OPTIONS = "environment.tasks.sums.options={{digits: {}, passes: {}, wrong: '{}'}}"
TRAIN = ("-m", "k25_train.train")
RL = ("-m", "k25_train.rl")
SHUFFLED = ("-m", "tests.helpers.shuffled_rewards")


class Tuning(NamedTuple):
    """A run of fine-tuning."""

    name: str
    steps: int
    options: str
    """Setting of its demonstrations."""
    settings: tuple[str, ...]


FIRST = Tuning("sft_first", 150, OPTIONS.format("2-5", "1-3", 0), ())
"""As `make rl-smoke`: what it takes to learn the sums."""
REDUNDANT = Tuning(
    "sft", 45, OPTIONS.format("2-4", "1-4", 0), ("optim.lr=5.0e-3", "optim.warmup=3", "optim.decay=30")
)
"""Then checked up to four times: what r alone leaves, since it makes nothing worse."""
WRONG = Tuning("sft_wrong", 30, OPTIONS.format("2-4", "1-4", 0.5), ("optim.warmup=2", "optim.decay=10"))
"""Then by a demonstrator who is wrong half of the time."""


class Verdict(NamedTuple):
    """A figure and its bar."""

    name: str
    value: float
    sign: str
    bar: float
    is_kept: bool


def demonstrations(bench: BenchRuns, name: str, options: str) -> str:
    """Write and index demonstrations; the setting of a run that is fine-tuned on them."""
    path, data = bench.folder / f"{name}.jsonl", bench.folder / f"{name}.yaml"
    if not path.with_name(f"{path.name}.chat.k25index").exists():
        told = ("experiment=rl_smoke", options, "--out", str(path))
        bench.python("-m", "k25_train.rl.demonstrations", *told)
        source = f"{{dir: {bench.folder}, tokenizer: {Path('datasets/chat/tokenizer.json').resolve()}, "
        source += f"sources: {{sums: {{format: chat, path: {path.name}, heldout: 128}}}}}}\n"
        data.write_text(source, encoding="utf-8")
        bench.python("-m", "k25_train.data", "index", f"data={data}")
    return f"data={data}"


def fine_tune(bench: BenchRuns, tuning: Tuning, start: str | Path) -> Path:
    """Fine-tune, and where the weights are then."""
    steps = tuning.steps
    settings = (
        *("experiment=rl_sft_smoke", demonstrations(bench, f"demonstrations_{tuning.name}", tuning.options)),
        *("cluster=local", "cluster.gpus_per_node=1", f"train.eval_interval={steps}"),
        *(f"checkpoint.init_from={start}", f"checkpoint.interval={steps}", *tuning.settings),
    )
    bench.run([Job(name=tuning.name, command=TRAIN, settings=settings, steps=steps)])
    return bench.checkpoint(tuning.name, steps)


def arm(name: str, start: Path, steps: int, seed: int, *settings: str, shuffled: bool = False) -> Job:
    """A run of reinforcement learning."""
    own = [
        *("experiment=rl_smoke", "cluster=local", "cluster.gpus_per_node=1", f"train.seed={seed}"),
        *(f"checkpoint.init_from={start}", f"train.eval_interval={steps}", f"checkpoint.interval={steps}"),
        *(f"rollout.eval_tasks={HELDOUT}", f"environment.tasks.sums.num_heldout={HELDOUT}", *settings),
        REDUNDANT.options,
    ]
    return Job(name=name, command=SHUFFLED if shuffled else RL, settings=tuple(own), steps=steps)


def toggle(bench: BenchRuns, start: Path, seeds: int) -> list[Verdict]:
    """With and without Toggle, from the same weights."""
    arms = [(kind, f"{kind}_{seed}", seed) for seed in range(1, seeds + 1) for kind in KINDS]
    bench.run([arm(name, start, STEPS, seed, KINDS[kind]) for kind, name, seed in arms])
    drawn = [Arm(label=LABELS[kind], rows=bench.rows(name)) for kind, name, _ in arms]
    plot_arms(drawn, bench.folder / "rl_toggle.png")
    found, lost = list[Verdict](), list[tuple[float, float]]()
    for seed in range(1, seeds + 1):
        before, free = bench.evaluations(f"r_{seed}")
        _, short = bench.evaluations(f"toggle_{seed}")
        tokens = [number(row["eval_response_tokens"]) for row in (before, free, short)]
        accuracy = [number(row["eval_accuracy"]) for row in (before, free, short)]
        print(
            f"seed {seed}: fine-tuned {accuracy[0]:.3f}, {tokens[0]:.1f} tokens; r alone {accuracy[1]:.3f}, "
            f"{tokens[1]:.1f}; Toggle {accuracy[2]:.3f}, {tokens[2]:.1f}"
        )
        lost.append((accuracy[0] - accuracy[2], accuracy[1] - accuracy[2]))
        found += [
            at_least(f"seed {seed}: tokens saved since fine-tuning", 1 - tokens[2] / tokens[0], MIN_SAVED),
            at_least(f"seed {seed}: tokens saved by Toggle", 1 - tokens[2] / tokens[1], MIN_SAVED_BY_TOGGLE),
        ]
    # A single evaluation is as uncertain as the bar is wide; all of them together are not.
    since_tuning, against_r = (sum(each) / seeds for each in zip(*lost, strict=True))
    return [
        *found,
        at_most("accuracy lost since fine-tuning, mean", since_tuning, MAX_LOST),
        at_most("accuracy lost against r alone, mean", against_r, MAX_LOST),
    ]


def learning(bench: BenchRuns, start: Path) -> list[Verdict]:
    """Reinforced, and with shuffled rewards."""
    wrong = fine_tune(bench, WRONG, start)
    jobs = [
        arm("learning", wrong, LEARNING_STEPS, 1, FREE, *LEARNING_RATE),
        arm("control", wrong, LEARNING_STEPS, 1, FREE, *LEARNING_RATE, shuffled=True),
    ]
    bench.run(jobs)
    gains = []
    for job in jobs:
        before, after = (number(row["eval_reward"]) for row in bench.evaluations(job.name))
        print(f"{job.name}: held-out reward {before:.3f} -> {after:.3f}")
        gains.append(after - before)
    before = number(bench.evaluations("learning")[0]["eval_reward"])
    return [
        at_most("held-out reward after fine-tuning", before, MOST_BEFORE),
        at_least("held-out reward gained", gains[0], MIN_GAINED),
        at_most("gained with shuffled rewards", gains[1], MIN_GAINED / 2),
    ]


def too_high_a_rate(bench: BenchRuns, start: Path) -> list[Verdict]:
    """Toggle at a rate at which noise becomes whole steps; printed for the record, without a bar."""
    rate = RATE_FACTOR * compose(["experiment=rl_smoke"]).optim.lr
    bench.run([arm("high_rate", start, STEPS, 1, f"optim.lr={rate:g}", f"optim.min_lr={rate:g}")])
    words = [
        f"{number(row['eval_accuracy']):.3f}, {number(row['eval_response_tokens']):.1f} tokens"
        for row in bench.evaluations("high_rate")
    ]
    print(f"at a rate of {rate:g}: {words[0]} -> {words[1]}")
    return []


def at_least(name: str, value: float, bar: float) -> Verdict:
    """A figure that should not be below its bar."""
    return Verdict(name, value, ">=", bar, value >= bar)


def at_most(name: str, value: float, bar: float) -> Verdict:
    """A figure that should not be above it."""
    return Verdict(name, value, "<=", bar, value <= bar)


def main() -> None:
    """Run the parts and print every figure next to its bar; ends non-zero if one is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.rl_toggle", description=__doc__)
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/bench_rl_toggle"), help="of all runs (%(default)s)"
    )
    parser.add_argument("--smoke", default=SMOKE, help="checkpoint to start from (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of reinforcement (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a core each (%(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, of %(default)s")
    options = parser.parse_args()
    folder = options.dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    bench = BenchRuns(folder, options.jobs)
    start = fine_tune(bench, REDUNDANT, fine_tune(bench, FIRST, options.smoke))
    parts = options.parts.split(",")
    found: list[Verdict] = []
    if "toggle" in parts:
        found += toggle(bench, start, options.seeds)
    if "learning" in parts:
        found += learning(bench, start)
    if "rate" in parts:
        found += too_high_a_rate(bench, start)
    table = Table("", "measured", "bar", "", title=f"reinforcement learning of sums, {STEPS} steps")
    for name, value, sign, bar, is_kept in found:
        table.add_row(name, f"{value:.3f}", f"{sign} {bar:.2f}", "kept" if is_kept else "MISSED")
    Console().print(table)
    sys.exit(not all(each.is_kept for each in found))


if __name__ == "__main__":
    main()
