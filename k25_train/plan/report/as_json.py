"""A plan as data: what `k25-plan --json` prints. Keys are described in the README of this room."""

import dataclasses
from collections.abc import Mapping
from enum import Enum

from k25_train.config.schema import Config
from k25_train.parameters.released import count_parameters
from k25_train.plan.assumptions import Assumptions
from k25_train.plan.context import exchange_of, reason_of
from k25_train.plan.memory.stage_memory import StageMemory
from k25_train.plan.memory.verdict import Fit
from k25_train.plan.report.labels import memory_amounts
from k25_train.plan.report.planned import Planned
from k25_train.plan.time.communication import communication
from k25_train.plan.time.step_plan import RUN_TOKENS, StepPlan
from k25_train.units import GB

VERSION = 1
"""Of the keys. It grows when one is renamed, removed or means something else; keys may be added."""


def plan_as_dict(planned: Planned) -> dict[str, object]:
    """Everything of a plan, in the order in which people ask."""
    config = planned.pipeline.config
    return {
        "version": VERSION,
        "model": config.model.name,
        "device": config.cluster.rates.device,
        "ranks": config.world_size,
        **_memory(planned),
        **_time(planned.step),
        "layout": planned.pipeline.layout.to_megatron(),
        "context": _context(config),
        "assumptions": assumptions_as_dict(planned.pipeline.assumptions),
        "stages": [_stage(memory, planned.verdict.limit_bytes) for memory in planned.memories],
        "parameters": dataclasses.asdict(count_parameters(config.model)),
        "communication": {kind: dataclasses.asdict(volume) for kind, volume in communication(config).items()},
    }


def _context(config: Config) -> dict[str, object] | None:
    sizes = config.parallelism
    if sizes.cp == 1:
        return None
    exchange = exchange_of(config)
    assert exchange is not None, "ranks that share sequences exchange latents"
    return {"cp": sizes.cp, "exchange": exchange.value, "reason": reason_of(config)}


def _memory(planned: Planned) -> dict[str, object]:
    verdict = planned.verdict
    remedy = verdict.remedy
    return {
        "fits": verdict.fit is not Fit.does_not_fit,
        "verdict": verdict.fit.value,
        "peak_gb": _gb(verdict.device_bytes),
        "allocated_gb": _gb(verdict.allocated_bytes),
        "limit_gb": _gb(verdict.limit_bytes),
        "margin_gb": _gb(verdict.margin_bytes),
        "fullest_stage": verdict.stage,
        "load_gb": _gb(verdict.load_bytes),
        "node_gb": _gb(verdict.node_bytes),
        "node_limit_gb": _gb(verdict.node_limit_bytes),
        "remedy": None
        if remedy is None
        else {
            "overrides": remedy.overrides,
            "verdict": remedy.fit.value,
            "left_gb": _gb(remedy.left_bytes),
            "times_cost": remedy.times_cost,
        },
    }


def _time(step: StepPlan) -> dict[str, object]:
    return {
        "tokens_per_s_per_gpu": step.tokens_per_s_per_gpu,
        "tflops_per_gpu": step.tflops,
        "mfu": step.mfu,
        "step_s": step.step_s,
        "tokens_per_step": step.tokens,
        "bubble_share": step.bubble_share,
        "exposed_s": {cause.name: seconds for cause, seconds in step.exposed_s.items()},
        "parts": [
            {
                "cause": part.cause.name,
                "what": part.cause.value,
                "seconds": part.seconds,
                "computed_from": part.how,
            }
            for part in step.parts
        ],
        "busy_s": dict(step.busy_s),
        "run": {"tokens": RUN_TOKENS, "days": step.days(), "gpu_hours": step.gpu_hours()},
    }


def _stage(memory: StageMemory, limit_bytes: float | None) -> dict[str, object]:
    return {
        "stage": memory.stage,
        "layers": [[layers.start, layers.stop] for layers in memory.layers],
        "peak_gb": _gb(memory.device),
        "allocated_gb": _gb(memory.tensors),
        "left_gb": None if limit_bytes is None else _gb(limit_bytes - memory.device),
        "fullest_phase": memory.fullest_phase,
        "passes_held": memory.num_held,
        "host_gb": _gb(memory.host + memory.snapshot),
        "items_gb": {each.label: each.value for each in memory_amounts(memory)},
    }


def assumptions_as_dict(assumptions: Assumptions) -> dict[str, object]:
    """What a plan assumes; enumerations by their values."""
    return _plain(dataclasses.asdict(assumptions))


def _plain(values: Mapping[str, object]) -> dict[str, object]:
    return {
        key: _plain(value) if isinstance(value, dict) else value.value if isinstance(value, Enum) else value
        for key, value in values.items()
    }


def _gb(num_bytes: float | None) -> float | None:
    return None if num_bytes is None else num_bytes / GB
