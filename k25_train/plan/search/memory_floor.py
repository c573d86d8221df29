"""The least that devices hold, without planning all of a candidate's memory; torch-free."""

from collections.abc import Iterable
from dataclasses import replace

from k25_train.config.schema import Config
from k25_train.parameters.megatron import (
    TrainedParameter,
    embedding_parameter,
    head_parameters,
    layer_parameters,
)
from k25_train.parameters.update_rules import rule_of
from k25_train.plan.assumptions import OtherCode
from k25_train.plan.memory.expert_exchange import exchange_bytes
from k25_train.plan.memory.offload import offload_budget
from k25_train.plan.memory.outside import context_bytes, gaps_share, nccl_bytes
from k25_train.plan.memory.pipeline_peak import output_bytes, saved_bytes, working_bytes
from k25_train.plan.memory.shared_keys import shared_key_bytes
from k25_train.plan.pipeline import StagePlan
from k25_train.plan.weight_bytes import GRADIENT_BYTES, WEIGHT_BYTES, state_bytes
from parallel.config import DepMode


def least_bytes(config: Config, ep: int, dp: int, *, on_device: bool) -> tuple[float, float, float, float]:
    """What a rank keeps of a dense layer, a layer with experts, the embedding and the head."""
    model, dtype = config.model, config.train.dtype
    each_bytes = WEIGHT_BYTES[dtype] + GRADIENT_BYTES

    def bytes_of(parameters: Iterable[TrainedParameter]) -> float:
        total = 0.0
        for parameter in parameters:
            size, replicas = (parameter.size / ep, dp / ep) if parameter.is_expert else (parameter.size, dp)
            state = state_bytes(rule_of(*parameter, config.optim, model).update, dtype) if on_device else 0
            total += size * (each_bytes + state / max(1.0, replicas))
        return total

    dense = bytes_of(layer_parameters(model, 0)) if model.num_dense_layers else 0.0
    moe = bytes_of(layer_parameters(model, model.num_layers - 1)) if model.num_moe_layers else 0.0
    return dense, moe, bytes_of([embedding_parameter(model)]), bytes_of(head_parameters(model))


def passes_bytes(stage: StagePlan) -> float:
    """What a stage's passes hold, but for images' features and an encoder in bubbles."""
    sizes, buffer = stage.balanced_sizes, 0
    if stage.config.activation.offloads:
        buffer = offload_budget(stage).device_bytes
    passes = saved_bytes(stage, sizes) + output_bytes(stage) + working_bytes(stage, sizes)
    shared = shared_key_bytes(stage.config, sizes)
    return passes + exchange_bytes(stage, sizes) + shared + buffer


def with_outside(config: Config, code: OtherCode, tensors: float) -> float:
    """What a device holds that has so many bytes of tensors, wherever the encoder is: each place of it has
    communicators of its own."""
    outside = (nccl_bytes(replace(config, dep=replace(config.dep, mode=mode)), code) for mode in DepMode)
    return (1 + gaps_share(config, code)) * tensors + context_bytes(config) + min(outside)
