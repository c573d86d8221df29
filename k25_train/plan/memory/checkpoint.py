"""What a checkpoint takes: on disk, in the host while it is saved and loaded; torch-free.

Each rank writes what it alone holds of the state, so all of them write a checkpoint once. A save copies that
into page-locked host memory, from which files are written while training goes on. A load reads straight into
the optimizer's state and the weights, through buffers of a fixed size; nothing of it is gathered on a device.
"""

from collections.abc import Iterable

from k25_train.config.basics import DType
from k25_train.config.checkpoint import CheckpointConfig
from k25_train.config.schema import Config
from k25_train.parameters.megatron import TrainedParameter, iterate_parameters
from k25_train.parameters.released import count_parameters
from k25_train.parameters.update_rules import is_trained, rule_of
from k25_train.plan.memory.states import chunk_parameters
from k25_train.plan.parameters import RuledParameter
from k25_train.plan.pipeline import PipelinePlan, StagePlan
from k25_train.plan.weight_bytes import WEIGHT_BYTES, host_state_bytes
from k25_train.units import MIB

READ_CHUNK_BYTES = 16 * MIB
"""What is asked of an object store at once, as a part of an upload has (8 to 16 MiB are advised). A read
takes two of them at most; a disk's are smaller."""
LOAD_STAGING_BYTES = 128 * MIB
"""Host memory through which a rank's ranges pass on their way to the device, or to another number format."""


def checkpoint_bytes(config: Config) -> int:
    """Size of a checkpoint: weights, float32 masters and moments, each once."""
    weights = count_parameters(config.model).total * WEIGHT_BYTES[config.train.dtype]
    return weights + _state_bytes(config, iterate_parameters(config.model))


def shard_bytes(stage: StagePlan) -> float:
    """What one rank of a stage writes: its shard of the optimizer's state and of the weights.

    Dense weights are shared by dp ranks, the experts of each of ep ranks by dp / ep of them, and a decoupled
    encoder by all ranks of the job.
    """
    config, dtype = stage.config, stage.config.train.dtype
    own = sum(_stored(each, dtype) for chunk in stage.chunks for each in chunk_parameters(stage, chunk))
    replicated = sum(_stored(each, dtype) for each in stage.parameters.encoder)
    return own / config.dp_cp + replicated / config.world_size


def snapshot_bytes(stage: StagePlan) -> float:
    """Page-locked host memory of one rank for the copy that files are written from; it is kept."""
    return shard_bytes(stage)


def load_buffer_bytes(checkpoint: CheckpointConfig) -> int:
    """Host memory of one rank for what it reads; all else is read to where it belongs."""
    return LOAD_STAGING_BYTES + checkpoint.writers * 2 * READ_CHUNK_BYTES


def fullest_shard(pipeline: PipelinePlan) -> float:
    """The most that any rank writes."""
    return max(shard_bytes(stage) for stage in pipeline.stages)


def _stored(parameter: RuledParameter, dtype: DType) -> int:
    """A parameter on disk, with its master and moments if it is trained."""
    state = 0 if parameter.update is None else host_state_bytes(parameter.update)
    return parameter.size * (WEIGHT_BYTES[dtype] + state)


def _state_bytes(config: Config, parameters: Iterable[TrainedParameter]) -> int:
    """Masters and moments of those that are trained."""
    trained = (each for each in parameters if is_trained(each.name, config.optim))
    return sum(
        each.size * host_state_bytes(rule_of(*each, config.optim, config.model).update) for each in trained
    )
