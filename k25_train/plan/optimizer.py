"""How each parameter is updated, and what the optimizer remembers on each rank; torch-free."""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from k25_train.config.optimizer import OptimName
from k25_train.config.schema import Config
from k25_train.config.vision import VisionPart
from k25_train.parameters.megatron import (
    TrainedParameter,
    embedding_parameter,
    head_parameters,
    iterate_parameters,
    layer_parameters,
    vision_parameters,
)
from k25_train.parameters.update_rules import ParameterRule, is_trained, rule_of
from k25_train.plan.layer_costs import MASTER_BYTES, MOMENT_BYTES, state_bytes
from k25_train.plan.layout import layout_of
from parallel.pipeline.layout import PipelineLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterKind:
    """Parameters of one name, shape and rule, in different layers."""

    name: str
    """`*` stands for the layer's number."""
    shape: tuple[int, ...]
    """With all experts of the layer."""
    num_parameters: int
    rule: ParameterRule

    @property
    def matrix(self) -> tuple[int, int] | None:
        """Rows and columns of what Muon orthogonalises; None for AdamW."""
        if self.rule.update is OptimName.adamw:
            return None
        *rows, columns = self.shape
        num_rows = rows[0] if len(rows) == 1 else rows[0] * rows[1]
        return num_rows // self.rule.num_matrices, columns


@dataclass(frozen=True, slots=True, kw_only=True)
class StageState:
    """What the optimizer keeps for the parameters of one pipeline stage."""

    stage: int
    num_weights: dict[OptimName, int]
    """Update -> trained parameters of the stage, each counted once however many ranks hold it."""
    state_bytes: int
    """Masters and moments, over all ranks of the stage; a decoupled encoder's are no stage's."""
    rank_bytes: float
    """What one of its ranks keeps: ZeRO-1 cuts dense weights over dp ranks, the experts of each of ep ranks
    over dp / ep, and a decoupled encoder over all ranks of the job. The padding of buckets shifts a few
    hundred elements from one rank to another."""


def parameter_kinds(config: Config) -> list[ParameterKind]:
    """Every kind of parameter that is updated, in the order of the forward pass."""
    kinds: dict[tuple[str, tuple[int, ...], ParameterRule], int] = {}
    for parameter in updated_parameters(config):
        rule = rule_of(*parameter, config.optim, config.model)
        name = re.sub(r"(?<=\.(?:layers|blocks)\.)\d+", "*", parameter.name)
        key = (name, parameter.shape, rule)
        kinds[key] = kinds.get(key, 0) + 1
    return [
        ParameterKind(name=name, shape=shape, num_parameters=count, rule=rule)
        for (name, shape, rule), count in kinds.items()
    ]


def updated_parameters(config: Config) -> Iterator[TrainedParameter]:
    """Every parameter but the frozen ones, in the order of the forward pass."""
    return _updated(config, iterate_parameters(config.model))


def stage_states(config: Config) -> list[StageState]:
    """Optimizer state of every pipeline stage."""
    layout = layout_of(config)
    return [
        _stage_state(config, stage, stage_parameters(config, layout, stage)) for stage in range(layout.pp)
    ]


def encoder_parameters(config: Config) -> list[TrainedParameter]:
    """The parameters that are updated in a decoupled encoder, of which every rank has a replica.

    None if it is coupled, or if the tower is frozen: a projector is then trained in the first stage.
    """
    return _vision_of(config, config.vision_placement.trained_encoder_parts)


def encoder_state_bytes(config: Config) -> int:
    """Masters and moments of a decoupled encoder, over all ranks of the job."""
    num_weights = _weights_by_update(config, encoder_parameters(config))
    return sum(number * state_bytes(update, config.train.dtype) for update, number in num_weights.items())


def stage_parameters(config: Config, layout: PipelineLayout, stage: int) -> Iterator[TrainedParameter]:
    """The parameters that are updated in a pipeline stage; of the vision part the first one has those that no
    decoupled encoder has."""
    for vp_stage in range(layout.vpp):
        if layout.is_first(stage, vp_stage):
            yield from _vision_of(config, config.vision_placement.trained_first_stage_parts)
            yield embedding_parameter(config.model)
        for layer in layout.layer_ids(stage, vp_stage):
            yield from layer_parameters(config.model, layer)
        if layout.is_last(stage, vp_stage):
            yield from head_parameters(config.model)


def _vision_of(config: Config, parts: Collection[VisionPart]) -> list[TrainedParameter]:
    return [each for each in vision_parameters(config.model) if VisionPart.of(each.name) in parts]


def _updated(config: Config, parameters: Iterable[TrainedParameter]) -> Iterator[TrainedParameter]:
    return (parameter for parameter in parameters if is_trained(parameter.name, config.optim))


def _stage_state(config: Config, stage: int, parameters: Iterable[TrainedParameter]) -> StageState:
    num_weights = _weights_by_update(config, parameters)
    total = sum(number * state_bytes(update, config.train.dtype) for update, number in num_weights.items())
    rank_bytes = total / config.dp + encoder_state_bytes(config) / config.world_size
    return StageState(stage=stage, num_weights=num_weights, state_bytes=total, rank_bytes=rank_bytes)


def _weights_by_update(config: Config, parameters: Iterable[TrainedParameter]) -> dict[OptimName, int]:
    num_weights = dict.fromkeys(OptimName, 0)
    for parameter in parameters:
        num_weights[rule_of(*parameter, config.optim, config.model).update] += parameter.size
    return num_weights


def rule_lines(kinds: Iterable[ParameterKind]) -> Iterator[str]:
    """A table, one line a kind of parameter."""
    header = ("parameter", "count", "shape", "update", "matrices", "decay", "lr", "why")
    rows = [header]
    for kind in kinds:
        rule = kind.rule
        rows.append(
            (
                kind.name,
                str(kind.num_parameters),
                sizes(kind.shape),
                "Muon" if rule.update is OptimName.muonclip else "AdamW",
                f"{rule.num_matrices} of {sizes(kind.matrix)}" if kind.matrix else "-",
                "yes" if rule.weight_decay else "-",
                f"x {rule.lr_scale:g}",
                rule.reason,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def state_lines(config: Config, states: Iterable[StageState]) -> Iterator[str]:
    """Bytes of state of a parameter, of each stage and rank, and of the job."""
    states, encoder = list(states), _weights_by_update(config, encoder_parameters(config))
    of_encoder = encoder_state_bytes(config)
    master, dtype = MASTER_BYTES[config.train.dtype], config.train.dtype
    for update, word, moments in (
        (OptimName.adamw, "AdamW", "two moments"),
        (OptimName.muonclip, "Muon", "momentum"),
    ):
        number = encoder[update] + sum(state.num_weights[update] for state in states)
        terms = f"master {master} + {moments} {MOMENT_BYTES[update]}"
        yield f"{word}: {number:,} parameters x {state_bytes(update, dtype)} bytes ({terms})"
    num_frozen = sum(parameter.size for parameter in iterate_parameters(config.model))
    num_frozen -= sum(parameter.size for parameter in updated_parameters(config))
    if num_frozen:
        yield f"frozen: {num_frozen:,} parameters (optim.vision.trained={config.optim.vision.trained.value})"
    yield f"stage  {'GiB of state':>14}  {f'GiB a rank of {config.dp}':>20}"
    for total, alike in groupby(states, key=lambda state: state.state_bytes):
        first, *_, last = [state.stage for state in alike] * 2
        stages = f"{first}-{last}" if last > first else str(first)
        yield f"{stages:>5}  {total / 2**30:14,.3f}  {total / config.dp / 2**30:20,.3f}"
    if of_encoder:
        each = f"{of_encoder / config.world_size / 2**30:20,.3f}"
        yield f"  DEP  {of_encoder / 2**30:14,.3f}  {each}  (vision, on each of {config.world_size:,} ranks)"
    yield f"{'all':>5}  {(of_encoder + sum(state.state_bytes for state in states)) / 2**30:14,.3f}"


def sizes(shape: Iterable[int]) -> str:
    """A shape as people write it."""
    return " x ".join(map(str, shape))


def as_dict(config: Config) -> dict[str, object]:
    """All of it, for JSON."""
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
            }
            for state in stage_states(config)
        ],
        "encoder_state_bytes": encoder_state_bytes(config),
    }
