"""Ways to break one rule of reinforcement learning."""

from collections.abc import Callable, Sequence
from typing import Any

from tests.helpers.legal_config import Broken, Legal, Values

CHOICES: Values = {"algorithm": "k25", "rollout": "in_process", "environment": "sums", "train.seq_len": 256}
"""What makes a legal configuration one of reinforcement learning; its sequences have room for a response."""


def broken(key: str, wrong: Sequence[Any], rule: str, **more: object) -> Callable[[Legal], Broken]:
    """A wrong value; `more` are other changes, `section__key`."""
    changes = CHOICES | {name.replace("__", "."): to for name, to in more.items()}
    return lambda legal: (changes | {key: legal.pick(wrong)}, key, rule)


def alone(legal: Legal) -> Broken:
    """One of the three groups without the others."""
    group = legal.pick(["algorithm", "rollout", "environment"])
    other = legal.pick([each for each in ("algorithm", "rollout", "environment") if each != group])
    return {group: CHOICES[group]}, other, f"must be given together with {group}"


REINFORCEMENT_BREAKS: dict[str, Callable[[Legal], Broken]] = {
    "one group alone": alone,
    "share of Toggle": broken("algorithm.toggle.percentile", [-0.1, 1.5, 25], "must be between 0 and 1"),
    "phase of Toggle": broken("algorithm.toggle.interval", [0, -3], "must be positive"),
    "ratio without 1": broken("algorithm.ratio_low", [1.5, 2], "must hold 1"),
    "one response": broken("algorithm.group_size", [1], "must be 2 or more"),
    "no tokens": broken("algorithm.token_cap", [0, -5], "must be positive"),
    "cut without phases": broken(
        "algorithm.token_cap", [4, 16], "needs algorithm.max_staleness=0", algorithm__max_staleness=2
    ),
    "steps that learn nothing": broken(
        "algorithm.other_versions", ["mask", "ratio_only"], "needs algorithm.steps_per_rollout=1",
        algorithm__steps_per_rollout=2,
    ),
    "penalty": broken("algorithm.ratio_penalty", [-1, -0.5], "must not be negative"),
    "embedded server": broken("rollout.urls", [["http://a:1"]], "must be empty with"),
    "no server": lambda legal: (
        CHOICES | {"rollout.engine": legal.pick(["vllm", "sglang"])}, "rollout.urls", "must name the servers"
    ),
    "no URL": broken("rollout.urls", [["node1:8000"]], "must be http", rollout__engine="sglang"),
    "temperature": broken("rollout.temperature", [0, -1], "must be positive"),
    "other temperature": broken("rollout.temperature", [0.7, 1.2], "must be 1: what is trained"),
    "responses beyond sequences": broken("rollout.max_tokens", [10**6, 4096], "do not fit train.seq_len"),
    "no weight": lambda _legal: (
        CHOICES | {"environment.tasks.sums.weight": 0}, "environment.tasks", "must have a source"
    ),
    "epochs": broken("environment.epochs", [0, -1], "must be positive"),
    "no family": broken("environment.tasks.sums.family", ["' '"], "must name a family"),
    "agent without a command": broken("environment.tasks.sums.agent", [[]], "must be a command"),
    "shards of one loop": broken("rollout.manager.shards", [2, 16], "must be 1 with"),
    "cache thresholds": broken("rollout.manager.kv_low", [0, 0.95], "must be above 0 and below"),
    "gateway port": broken("rollout.manager.gateway_port", [70_000], "must be a port"),
    "status port": broken("rollout.manager.status_port", [0, -1], "must be a port, or null"),
    "gateway address": broken("rollout.manager.gateway_host", ["' '"], "must be an address"),
    "sandbox without an image": broken(
        "environment.sandbox.image", [None, "' '"], "must name the image",
        environment__sandbox__kind="container",
    ),
    "image of this machine": broken("environment.sandbox.image", ["python:3.12"], "must be null with"),
    "bonus": broken(
        "environment.tasks.sums.rubrics", [{"helpfulness": 0}, {"helpfulness": -0.5}], "must be positive"
    ),
    "rubrics without a judge": broken(
        "environment.tasks.sums.rubrics", [{"helpfulness": 0.2}], "needs rollout.judge_url"
    ),
    "judge without a folder": broken(
        "rollout.judge_model", [None], "must be given together", rollout__judge_url="http://a:1",
        rollout__judge_version=3,
    ),
    "judge's URL": broken(
        "rollout.judge_url", ["node1:8000"], "must be an http", rollout__judge_model="served",
        rollout__judge_version=3,
    ),
    "judge without a word": broken("rollout.judge_max_tokens", [0, -1], "must be positive"),
    "rounded engines": broken("rollout.weights", ["int4"], "needs model.quantization=int4_qat"),
    "shared responses": broken(
        "algorithm.form", ["sequence"], "needs parallelism.cp=1", parallelism__cp=2, parallelism__pp=1,
        parallelism__vpp=1, parallelism__ep=1, cluster__nodes=1, cluster__gpus_per_node=2,
        parallelism__overlap_expert_comm=False, parallelism__delay_wgrad=False, train__micro_batch_size=2,
        train__global_batch_size=8, train__eval_sequences=8,
    ),
}  # fmt: skip
