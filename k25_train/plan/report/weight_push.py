"""`k25-plan rl`: what a push of weights to engines takes, as tables and as JSON."""

import argparse
from typing import Any

from rich.console import Console

from k25_train.config.rollout import EngineWeights
from k25_train.config.schema import Config
from k25_train.plan.report.views import print_json
from k25_train.plan.weight_push import (
    PUBLISHED,
    PushedBytes,
    PushPlan,
    broadcast_s,
    plan_pushes,
    pushed_bytes,
)
from k25_train.tables import fitting_table
from k25_train.units import GB, format_count

PUBLISHED_LIMITS = (
    "K2 on all GPUs of its training: under 30 s (K2, section 3.3); on thousands of GPUs: about 20 s"
)
"""What Moonshot says of its own pushes."""


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `k25-plan rl`."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as for k25-train")
    parser.add_argument(
        "--weights",
        choices=[each.value for each in EngineWeights],
        help="number format of the engines; else that of rollout.weights, int4 where there is none",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead")


def show_pushes(config: Config, options: argparse.Namespace, console: Console) -> None:
    """Print what the arguments ask for."""
    configured = EngineWeights.int4 if config.rollout is None else config.rollout.weights
    weights = EngineWeights(options.weights) if options.weights else configured
    if options.json:
        print_json(pushes_as_dict(config, weights))
    else:
        print_pushes(config, weights, console)


def print_pushes(config: Config, weights: EngineWeights, console: Console) -> None:
    """Print the bytes of a push, its seconds by each way, and published ones next to their plans."""
    pushed = pushed_bytes(config.model, weights)
    title = f"Weights of {config.model.name} as {weights.value}: {pushed.total / GB:,.1f} GB"
    console.print(fitting_table(title, _size_rows(pushed, weights), console.width, left=("part", "as")))
    gpus = f"{config.world_size} {config.cluster.rates.device} ({config.cluster.nodes} nodes)"
    plans = plan_pushes(config, weights)
    title = f"A push from {gpus} to engines on the same"
    rows = [_push_row(plan) for plan in plans]
    console.print(fitting_table(title, rows, console.width, left=("rollout.transport",), least=("host GB",)))
    rows = [
        {
            "by checkpoint-engine": each.what,
            "GB": f"{each.num_bytes / GB:,.0f}",
            "measured s": f"{each.seconds:.2f}",
            "planned s": f"{broadcast_s(each.num_bytes, is_one_node=each.is_one_node):.2f}",
        }
        for each in PUBLISHED
    ]
    console.print(fitting_table("Published", rows, console.width, left=("by checkpoint-engine",)))
    console.print(PUBLISHED_LIMITS, soft_wrap=True)


def pushes_as_dict(config: Config, weights: EngineWeights) -> dict[str, Any]:
    """The same as plain values: bytes and seconds."""
    pushed = pushed_bytes(config.model, weights)
    return {
        "weights": weights.value,
        "bytes": {"experts": pushed.experts, "rest": pushed.rest, "total": pushed.total},
        "pushes": {
            plan.way: {
                "pack_s": plan.pack_s,
                "to_host_s": plan.to_host_s,
                "send_s": plan.send_s,
                "seconds": plan.seconds,
                "device_bytes": plan.device_bytes,
                "host_bytes": plan.host_bytes,
            }
            for plan in plan_pushes(config, weights)
        },
    }


def _size_rows(pushed: PushedBytes, weights: EngineWeights) -> list[dict[str, str]]:
    rest = "float32" if weights is EngineWeights.float32 else "bfloat16"
    experts = "INT4, groups of 32" if weights is EngineWeights.int4 else rest
    parts = (
        ("routed experts", pushed.num_experts, experts, pushed.experts),
        ("everything else", pushed.num_rest, rest, pushed.rest),
    )
    return [
        {"part": part, "weights": format_count(number), "as": kind, "GB": f"{size / GB:,.1f}"}
        for part, number, kind, size in parts
    ]


def _push_row(plan: PushPlan) -> dict[str, str]:
    return {
        "rollout.transport": plan.way,
        "pack s": f"{plan.pack_s:.2f}",
        "to host s": f"{plan.to_host_s:.2f}",
        "send, load s": f"{plan.send_s:.1f}",
        "seconds": f"{plan.seconds:.1f}",
        "GB per GPU": f"{plan.device_bytes / GB:.1f}",
        "host GB": f"{plan.host_bytes / GB:,.0f}",
    }
