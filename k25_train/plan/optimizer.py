"""How each parameter is updated, and what the optimizer remembers on each rank; torch-free."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from k25_train.config.optimizer import OptimizerOffload, OptimName
from k25_train.config.schema import Config
from k25_train.config.vision import VisionPart
from k25_train.parameters.megatron import TrainedParameter, iterate_parameters, vision_parameters
from k25_train.parameters.update_rules import ParameterRule, is_trained, rule_of
from k25_train.plan.pipeline import PipelinePlan, StagePlan
from k25_train.plan.weight_bytes import host_state_bytes, state_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterKind:
    """Parameters of one name, shape and rule, in different layers."""

    name: str
    """Name of the parameters, with `*` in place of the layer's number."""
    shape: tuple[int, ...]
    """Shape of each, with all experts of the layer."""
    num_parameters: int
    """Parameters of this kind."""
    rule: ParameterRule
    """How they are updated."""

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
    """Position in the pipeline, counted from 0."""
    num_weights: dict[OptimName, int]
    """Update -> trained parameters of the stage, each counted once however many ranks hold it."""
    state_bytes: int
    """Masters and moments over all ranks of the stage, without those of a decoupled encoder."""
    rank_bytes: float
    """What one of its ranks keeps: ZeRO-1 cuts dense weights over dp ranks, the experts of each of ep ranks
    over dp / ep, and a decoupled encoder over all ranks of the job. The padding of buckets shifts a few
    hundred elements from one rank to another."""
    host_bytes: float
    """What one of its ranks keeps in page-locked host memory, at the peak as between steps; 0 if state is on
    the device."""


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
    parameters = iterate_parameters(config.model)
    return (parameter for parameter in parameters if is_trained(parameter.name, config.optim))


def encoder_parameters(config: Config) -> list[TrainedParameter]:
    """The parameters that are updated in a decoupled encoder, of which every rank has a replica.

    Empty if it is coupled, or if the tower is frozen: a projector is then trained in the first stage.
    """
    return _vision_of(config, config.vision_placement.trained_encoder_parts)


def encoder_state_bytes(config: Config) -> int:
    """Masters and moments of a decoupled encoder, over all ranks of the job."""
    num_weights = weights_by_update(config, encoder_parameters(config))
    return sum(number * state_bytes(update, config.train.dtype) for update, number in num_weights.items())


def optimizer_state_bytes(pipeline: PipelinePlan) -> int:
    """Masters and moments over all ranks of the job."""
    states = sum(state.state_bytes for state in stage_states(pipeline))
    return states + encoder_state_bytes(pipeline.config)


def stage_parameters(stage: StagePlan) -> Iterator[TrainedParameter]:
    """The parameters that are updated in a pipeline stage; of the vision part the first one has those that no
    decoupled encoder has."""
    config = stage.config
    if stage.stage == 0:
        yield from _vision_of(config, config.vision_placement.trained_first_stage_parts)
    yield from stage.text_parameters


def stage_states(pipeline: PipelinePlan) -> list[StageState]:
    """Optimizer state of every pipeline stage."""
    return [stage_state(stage) for stage in pipeline.stages]


def stage_state(stage: StagePlan) -> StageState:
    """Optimizer state of one pipeline stage."""
    config = stage.config
    num_weights = weights_by_update(config, stage_parameters(stage))
    total = sum(number * state_bytes(update, config.train.dtype) for update, number in num_weights.items())
    encoder = weights_by_update(config, encoder_parameters(config))
    of_encoder = sum(number * state_bytes(update, config.train.dtype) for update, number in encoder.items())
    return StageState(
        stage=stage.stage,
        num_weights=num_weights,
        state_bytes=total,
        rank_bytes=total / config.dp_cp + of_encoder / config.world_size,
        host_bytes=_host_bytes(config, num_weights, encoder),
    )


def _host_bytes(
    config: Config, num_weights: Mapping[OptimName, int], encoder: Mapping[OptimName, int]
) -> float:
    """Bytes that a rank keeps in the host of a stage's weights, and of a decoupled encoder's."""
    if config.optim.offload is OptimizerOffload.none:
        return 0.0
    of_stage, of_encoder = (
        sum(number * host_state_bytes(update) for update, number in weights.items())
        for weights in (num_weights, encoder)
    )
    return of_stage / config.dp_cp + of_encoder / config.world_size


def weights_by_update(config: Config, parameters: Iterable[TrainedParameter]) -> dict[OptimName, int]:
    """Update -> number of weights that it updates."""
    num_weights = dict.fromkeys(OptimName, 0)
    for parameter in parameters:
        num_weights[rule_of(*parameter, config.optim, config.model).update] += parameter.size
    return num_weights


def _vision_of(config: Config, parts: Collection[VisionPart]) -> list[TrainedParameter]:
    return [each for each in vision_parameters(config.model) if VisionPart.of(each.name) in parts]
