"""Faults of people: settings that are wrong, or that the run cannot go on with; and clocks that are set."""

from __future__ import annotations

import random

from tests.helpers.faults.plans import DONE, NAMED, Plan, draw_moment, draw_start
from tests.helpers.faults.scenes import World

ALWAYS = (
    "train.stepz=3",
    "train.steps=0",
    "train.global_batch_size=3 train.micro_batch_size=2",
    "train.seq_len=-128",
    "train.seq_len=16",
    "train.dtype=float7",
    "train.seed=1.5",
    "model.num_layers=0",
    "model.hidden_size=65",
    "model.num_experts_per_token=9",
    "model.vocab_size=100",
    "model=k9",
    "parallelism.pp=3",
    "parallelism.ep=3",
    "cluster.gpus_per_node=3",
    "cluster.nodes=0",
    "optim.lr=nan",
    "optim.lr=-1e-3",
    "optim.lr=1e-3,1e-4",
    "optim.warmup=100",
    "checkpoint.keep=0",
    "checkpoint.interval=-1",
    "data.dir=/nonexistent/set",
    "data.dir=/etc/passwd",
    "data.dir=s3://no-such-bucket-of-ours/set",
    "data.tokenizer=/nonexistent/tokenizer.json",
    "data.sources.text.weight=-0.5",
    "data.max_skipped_samples=-1",
    "run.dir=/proc/k25",
    "run.dir=/etc/passwd/run",
    "run.dir=",
    "experiment=nothing",
    "-m train.seed=1,2",
    "train.trace_step=99",
    "train.stall_timeout_s=0",
)
"""Overrides that no run can have."""
ON_RESUME = (
    "train.seed=8",
    "train.steps=1",
    "train.seq_len=136",
    "train.global_batch_size=4",
    "model.hidden_size=128 model.num_attention_heads=4",
    "model.num_layers=4",
    "model.rope_theta=10000",
    "data.shuffle=false",
    "data.limit_samples=3",
    "data.sources.text.kinds=[ocr]",
    "optim=adamw",
    "checkpoint.resume=false",
)
"""Overrides that a run cannot go on with that has a checkpoint of step 2 or later."""
RUINOUS = ("optim.lr=1e30 optim.max_skipped_steps=0", "optim.lr=1e12 optim.max_skipped_steps=0")
"""Overrides after which gradients are not finite."""


def draw_override(rng: random.Random, world: World) -> Plan:
    """Overrides that cannot be used: an error says so, and costs nothing."""
    case = rng.random()
    layout, started_at = draw_start(rng, earliest=0 if case < 0.5 else 2)
    is_ruinous = case > 0.85
    chosen = rng.choice(ALWAYS if case < 0.5 else RUINOUS if is_ruinous else ON_RESUME)
    return Plan(
        kind="override",
        text=chosen,
        layout=layout,
        started_at=started_at,
        # The update of the last step is not followed by a gradient that shows what it did.
        ends=frozenset({NAMED, DONE} if is_ruinous else {NAMED}),
        overrides=chosen.split(" "),
        # A step whose gradient is finite is taken for sound, whatever it does to the weights.
        num_kept=1 if is_ruinous else 2,
        ends_there=is_ruinous,
    )


def draw_clock(rng: random.Random, world: World) -> Plan:
    """The time of day jumps on a rank; a run knows none."""
    layout, started_at = draw_start(rng)
    moment = draw_moment(rng, world, layout, started_at)
    seconds = rng.choice([-7200, 7200, -(10**8), 10**8, -1, 3600 * 24])
    return Plan(
        kind="clock",
        text=f"jumps by {seconds:,} s, {moment}",
        layout=layout,
        started_at=started_at,
        ends=frozenset({DONE}),
        moment=moment,
        strike=lambda _, job: job.shift_clock(seconds),
    )
