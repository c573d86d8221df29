"""Update rules and optimizer state, as lines of text and as JSON; torch-free."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import groupby

from k25_train.config.optimizer import OptimName
from k25_train.config.parts import ModelPart
from k25_train.parameters.megatron import iterate_parameters
from k25_train.plan.optimizer import (
    ParameterKind,
    encoder_parameters,
    encoder_state_bytes,
    optimizer_state_bytes,
    parameter_kinds,
    stage_states,
    updated_parameters,
    weights_by_update,
)
from k25_train.plan.pipeline import PipelinePlan
from k25_train.plan.report.text import format_shape
from k25_train.plan.time.optimizer import optimizer_times, slowest_optimizer
from k25_train.plan.weight_bytes import MASTER_BYTES, MOMENT_BYTES, state_bytes
from k25_train.units import GB, GIB


def rule_lines(kinds: Iterable[ParameterKind]) -> Iterator[str]:
    """A table, one line per kind of parameter."""
    header = ("parameter", "count", "shape", "update", "matrices", "decay", "lr", "why")
    rows = [header]
    for kind in kinds:
        rule = kind.rule
        rows.append(
            (
                kind.name,
                str(kind.num_parameters),
                format_shape(kind.shape),
                "Muon" if rule.update is OptimName.muonclip else "AdamW",
                f"{rule.num_matrices} of {format_shape(kind.matrix)}" if kind.matrix else "-",
                "yes" if rule.weight_decay else "-",
                f"x {rule.lr_scale:g}",
                rule.reason,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def state_lines(pipeline: PipelinePlan) -> Iterator[str]:
    """Optimizer state per parameter, then per stage and rank, then of the whole job."""
    yield from _lines_by_update(pipeline)
    config, of_encoder = pipeline.config, encoder_state_bytes(pipeline.config)
    yield f"stage  {'GiB of state':>14}  {f'GiB per rank of {config.dp_cp}':>20}"
    for total, alike in groupby(stage_states(pipeline), key=lambda state: state.state_bytes):
        first, *_, last = [state.stage for state in alike] * 2
        stages = f"{first}-{last}" if last > first else str(first)
        yield f"{stages:>5}  {total / GIB:14,.3f}  {total / config.dp_cp / GIB:20,.3f}"
    if of_encoder:
        each = f"{of_encoder / config.world_size / GIB:20,.3f}"
        yield f"  DEP  {of_encoder / GIB:14,.3f}  {each}  (vision, on each of {config.world_size:,} ranks)"
    yield f"{'all':>5}  {optimizer_state_bytes(pipeline) / GIB:14,.3f}"
    most = max(state.host_bytes for state in stage_states(pipeline))
    if most:
        on_node = most * config.cluster.gpus_per_node
        yield f"in page-locked host memory: {most / GB:.1f} GB per rank at most, {on_node / GB:.1f} on a node"


def time_lines(pipeline: PipelinePlan) -> Iterator[str]:
    """How long the slowest stage's optimizer takes in a step, and what in it."""
    times, muon = slowest_optimizer(pipeline), pipeline.config.optim.muon
    yield (
        f"A step of stage {times.stage}, computed: {times.total_s:.2f} s, with Newton-Schulz "
        f"{times.newton_schulz_s:.2f} s ({times.newton_schulz_flops:.3g} FLOPs per rank in "
        f"{muon.newton_schulz_dtype.value}; the largest matrix {times.largest_matrix_s:.3f} s, which more "
        f"ranks do not shorten), exchange {times.exchange_s:.2f} s in {muon.exchange_dtype.value}, state "
        f"through the device {times.stream_s:.2f} s ({times.stream_bytes / GB:.1f} GB each way) at the same "
        "time, and "
        f"{times.edges_s:.2f} s before and after. Nothing of it was measured on a GPU."
    )


def _lines_by_update(pipeline: PipelinePlan) -> Iterator[str]:
    """Parameters of each update and bytes of state per parameter; then the frozen ones."""
    config, states = pipeline.config, stage_states(pipeline)
    encoder, dtype = weights_by_update(config, encoder_parameters(config)), config.train.dtype
    for update, word, moments in (
        (OptimName.adamw, "AdamW", "two moments"),
        (OptimName.muonclip, "Muon", "momentum"),
    ):
        number = encoder[update] + sum(state.num_weights[update] for state in states)
        terms = f"master {MASTER_BYTES[dtype]} + {moments} {MOMENT_BYTES[update]}"
        yield f"{word}: {number:,} parameters x {state_bytes(update, dtype)} bytes ({terms})"
    num_frozen = sum(parameter.size for parameter in iterate_parameters(config.model))
    num_frozen -= sum(parameter.size for parameter in updated_parameters(config))
    if num_frozen:
        frozen = ", ".join(part.value for part in ModelPart if part not in config.optim.trained)
        yield f"frozen: {num_frozen:,} parameters ({frozen})"


def optimizer_as_dict(pipeline: PipelinePlan) -> dict[str, object]:
    """Rules and states, for JSON."""
    config = pipeline.config
    return {
        "parameters": [
            {
                "name": kind.name,
                "count": kind.num_parameters,
                "shape": list(kind.shape),
                "update": kind.rule.update.value,
                "num_matrices": kind.rule.num_matrices,
                "matrix": kind.matrix and list(kind.matrix),
                "weight_decay": kind.rule.weight_decay,
                "lr_scale": kind.rule.lr_scale,
                "reason": kind.rule.reason,
            }
            for kind in parameter_kinds(config)
        ],
        "state_bytes_per_parameter": {
            update.value: state_bytes(update, config.train.dtype) for update in OptimName
        },
        "stages": [
            {
                "stage": state.stage,
                "num_weights": {update.value: number for update, number in state.num_weights.items()},
                "state_bytes": state.state_bytes,
                "rank_bytes": state.rank_bytes,
                "host_bytes": state.host_bytes,
            }
            for state in stage_states(pipeline)
        ],
        "encoder_state_bytes": encoder_state_bytes(config),
        "times": [
            asdict(times) | {"total_s": times.total_s} for times in map(optimizer_times, pipeline.stages)
        ],
    }
