"""What images cost in time, on 4 real ranks with pp=4: throughput of a step with the vision tower (coupled,
decoupled upfront, and in bubbles), relative to that of a text-only step of as many tokens.

    python -m tests.bench.dep

A shrunk model of 8 layers trains 16 micro-batches of 128 tokens per step in float32, on the same batch every
time; the text-only step has as many tokens, all of them text. Of equal steps the fastest counts: other load
on the machine only makes steps slower. The optimizer (AdamW) is part of a step. Measured twice:

- As it is. Ranks share the machine's cores: one that waits gives its core to another, so work in idle time
  saves nothing, and spreading work over ranks little. This is what the tower costs on these cores, no more.
- In slow motion (tests/helpers/paced_ranks.py). The same code, processes and messages, but passes and tower
  last as long as their model FLOPs take at a rate so low that computing is a small part of it, the rest is
  sleep; so ranks behave as if each had its own device. The plan of the bubbles knows that rate. Assumed is
  therefore that tower and language model run at one rate, and that loopback, some milliseconds per message,
  is fast compared with passes; what engines and schedules wait for is real. "Computing" is the part of the
  busiest rank's passes that was not sleep: above a fifth, other work on the machine has disturbed the row, or
  that of the text-only step, and ratios say nothing.

The limit by FLOPs is text-only time / (text-only time + tower / 4): the tower's FLOPs (3 forward passes
coupled, 4 decoupled, as it encodes twice) spread evenly over the ranks, before and after a pipeline that does
not change. Bubbles may surpass it: their limit is 1 as long as the tower fits into the idle time. "Tower of
idle" is how much of it the tower would fill, "planned" what the plan of the step promises if all takes as
long as it knows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from k25_train.compose.resolve import compose
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.time.step import step_times
from parallel.dep.bubbles import BubblePlan
from tests.helpers.paced_ranks import Clock, slow_down
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run
from tests.helpers.smoke_mix import mix
from tests.helpers.tiny_shards import all_words, write_tiny_shard_set

NUM_RANKS = 4
WARM_UP_STEPS, STEPS_AS_IT_IS, STEPS_SLOW = 2, 4, 2
NUM_STEPS = WARM_UP_STEPS + STEPS_AS_IT_IS + STEPS_SLOW
DISTURBED = 0.2
"""Share of computing in slow motion above which ranks have waited for a core. Alone they stay below."""
WORK = (
    "model.num_layers=8 model.expert_ffn_hidden_size=256 model.dense_ffn_hidden_size=768 "
    "model.vision.num_layers=3 model.vision.hidden_size=48 model.vision.ffn_hidden_size=96 "
    "train.global_batch_size=16 train.micro_batch_size=1 optim=adamw optim.warmup=1 "
    f"optim.decay=1 train.steps={NUM_STEPS}"
).split()
RATES = (
    # A forward pass of a rank then lasts 0.2 s, and takes some milliseconds to compute.
    "cluster.rates.float32_tflops=0.0004 "
    # Pixels are where the tower is, and loopback sends some GB a second.
    "cluster.host_copy_gb_per_s=1000 cluster.network_gb_per_s=1"
).split()
IMAGES = mix(text=0.4, caption=0.4, ocr=0.1, video=0.1)
TEXT = ["dep.mode=coupled", *mix(text=1)]
MODES = {
    "coupled": ["dep.mode=coupled"],
    "upfront": ["dep.schedule=upfront"],
    "bubbles": ["dep.schedule=bubbles"],
}


class Step(NamedTuple):
    """What one rank did in a step."""

    seconds: float
    is_slow: bool
    text_s: float
    """Seconds that its passes last in slow motion."""
    vision_s: float
    """The same of the tower."""
    computing_share: float
    """Of both."""


class Measured(NamedTuple):
    """A batch, trained several times."""

    as_it_is_s: float
    """The fastest step."""
    slow_s: float
    median_slow_s: float
    text_s: float
    """Seconds that the passes of all ranks last in slow motion."""
    vision_s: float
    """The same of the tower."""
    computing_share: float
    """Of the busiest rank, in the fastest step in slow motion."""
    vision_token_share: float
    more_s: float
    """How much longer than the text-only step the plan of the bubbles has it; 0 without such a plan."""


class OfRank(NamedTuple):
    """What one rank reports."""

    steps: list[Step]
    """After warm-up, as it is and then in slow motion."""
    vision_token_share: float
    more_s: float
    """As `Measured` has it."""


def train(context: RankContext, arguments: Sequence[str]) -> OfRank:
    """Train the first batch again and again."""
    from k25_train.plan import vision_planner as planning
    from k25_train.training.step import train_step

    plan_bubbles, plans = planning.plan_bubbles, list[BubblePlan]()

    def plan_and_keep(*args: Any, **kwargs: Any) -> BubblePlan:
        plans.append(plan_bubbles(*args, **kwargs))
        return plans[-1]

    planning.plan_bubbles = plan_and_keep
    run, clock, steps = start_run(context, arguments), Clock(), list[Step]()
    slow_down(run, clock, run.config)
    batch = run.data.loader.plan(0)
    # Steps are alike if their batches are.
    run.data.loader.plan = lambda step: batch
    with run.data:
        for step in range(1, NUM_STEPS + 1):
            clock.clear()
            clock.is_slow = step > WARM_UP_STEPS + STEPS_AS_IT_IS
            seconds = train_step(run, step).step_time_s
            times = clock.text_s, clock.vision_s, clock.computing_share
            steps.append(Step(seconds, clock.is_slow, *times))
        batches = run.data.loader.micro_batches(
            batch, dp_rank=0, dp_size=1, reads=all_words(with_pixels=False)
        )
    media_pad = run.data.loader.tokenizer.media_pad
    num_vision = sum(int((each.tokens == media_pad).sum()) for each in batches)
    share = num_vision / sum(each.tokens.numel() for each in batches)
    return OfRank(
        steps[WARM_UP_STEPS:], share, plans[0].start_delay_s + plans[0].end_delay_s if plans else 0.0
    )


def measure(arguments: Sequence[str]) -> Measured:
    """Train on 4 ranks; a step takes as long as its slowest rank."""
    by_rank = run_ranks(train, NUM_RANKS, list(arguments), timeout_s=600.0)
    steps = list(zip(*(rank.steps for rank in by_rank), strict=True))
    seconds = [max(rank.seconds for rank in step) for step in steps]
    slow_s = seconds[STEPS_AS_IT_IS:]
    fastest = steps[seconds.index(min(slow_s))]
    return Measured(
        as_it_is_s=min(seconds[:STEPS_AS_IT_IS]),
        slow_s=min(slow_s),
        median_slow_s=median(slow_s),
        text_s=sum(rank.text_s for rank in fastest),
        vision_s=sum(rank.vision_s for rank in fastest),
        computing_share=max(rank.computing_share for rank in fastest),
        vision_token_share=by_rank[0].vision_token_share,
        more_s=by_rank[0].more_s,
    )


def main() -> None:
    """Measure all three without and with virtual stages, and print a table of each."""
    with tempfile.TemporaryDirectory() as folder:
        data, run = write_tiny_shard_set(Path(folder, "shards")), Path(folder, "run")
        for vpp in (1, 2):
            common = overrides(data, run, *layout(pp=NUM_RANKS, vpp=vpp), *WORK, *RATES)
            text = measure([*common, *TEXT])
            found = {mode: measure([*common, *IMAGES, *choice]) for mode, choice in MODES.items()}
            planned_s = step_times(plan_pipeline(compose([*common, *TEXT]))).text.makespan_s
            Console(width=130).print(table(vpp, planned_s, text, found))


def table(vpp: int, planned_s: float, text: Measured, found: dict[str, Measured]) -> Table:
    """Throughputs, that of the text-only step = 1.

    Args:
        vpp: virtual stages.
        planned_s: seconds of the text-only step's schedule in slow motion, by arithmetic.
        text: the text-only step.
        found: by mode.
    """
    idle_s = NUM_RANKS * planned_s - text.text_s
    tokens = found["bubbles"].vision_token_share
    rows = Table(
        "mode",
        "tower's FLOPs", "tower of idle", "as it is", "slow motion", "its median", "planned",
        "limit by FLOPs", "share of limit", "computing",
        title=f"pp={NUM_RANKS}, vpp={vpp}, {tokens:.0%} vision tokens; throughput, text only = 1\n"
        f"a text-only step takes {text.as_it_is_s:.2f} s as it is, {text.slow_s:.2f} s in slow motion "
        f"({planned_s:.2f} s by arithmetic, {idle_s / (NUM_RANKS * planned_s):.0%} of it idle)",
    )  # fmt: skip
    rows.add_row("text only", "", "", "1", "1", "", "", "", "", computing(text))
    for mode, each in found.items():
        ratio, limit = text.slow_s / each.slow_s, text.slow_s / (text.slow_s + each.vision_s / NUM_RANKS)
        rows.add_row(
            mode,
            f"{each.vision_s / (each.vision_s + each.text_s):.1%}",
            f"{each.vision_s / idle_s:.0%}",
            f"{text.as_it_is_s / each.as_it_is_s:.2f}",
            f"{ratio:.3f}",
            f"{text.median_slow_s / each.median_slow_s:.3f}",
            f"{planned_s / (planned_s + each.more_s):.3f}" if mode == "bubbles" else "",
            f"{limit:.3f}",
            f"{ratio / limit:.1%}",
            computing(each),
        )
    return rows


def computing(measured: Measured) -> str:
    """The share, and whether other work on the machine can be seen in it."""
    share = measured.computing_share
    return f"{share:.0%}" + (" DISTURBED" if share > DISTURBED else "")


if __name__ == "__main__":
    main()
