"""Build the optimizer: a rule per parameter, state sharded over data-parallel ranks (ZeRO-1)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, Adam, MegatronOptimizer, OptimizerConfig
from torch import nn

from k25_train.config.model import ModelConfig
from k25_train.config.optimizer import OptimConfig, OptimizerOffload, OptimName
from k25_train.config.parts import ModelPart
from k25_train.errors import ConfigError
from k25_train.optim.muon import STATE_KEYS as MUON_STATE_KEYS
from k25_train.optim.muon import Muon, bind_matrices
from k25_train.optim.streamed_adamw import ADAM_STATE_KEYS, StreamedAdamW
from k25_train.parameters.update_rules import ParameterRule, is_trained, rule_of
from parallel.host.copier import copier_of
from parallel.host.memory import HostMemoryError
from parallel.host.state_stream import StateStream
from parallel.megatron.host_optimizer import HostOptimizer
from parallel.megatron.replicas import EncoderReplica
from parallel.megatron.sharded_optimizer import OptimizerPartition, ShardedOptimizer, shard
from parallel.megatron.skip_non_finite import SkipNonFiniteOptimizer
from parallel.megatron.state_store import ParamGroups, ResidentStore
from parallel.topology import Topology

Rules = Mapping[nn.Parameter, ParameterRule]
Place = Callable[[ShardedOptimizer, OptimizerPartition], ShardedOptimizer]
"""Moves the state of a partition's new optimizer to where it is to rest."""


def freeze(modules: Iterable[nn.Module], optim: OptimConfig) -> None:
    """Switch off gradients of the parts that are not trained: they get no buffers and no state."""
    for module in modules:
        for name, parameter in module.named_parameters():
            if not is_trained(name, optim):
                parameter.requires_grad_(False)


def parameter_rules(chunks: Sequence[nn.Module], optim: OptimConfig, model: ModelConfig) -> Rules:
    """The rule of every trained parameter of these chunks."""
    return {
        parameter: rule_of(name, tuple(parameter.shape), optim, model)
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad
    }


def updated_by_muon(rules: Rules) -> Iterator[nn.Parameter]:
    """The parameters that Muon updates: they need gradient buffers separate from the others'."""
    return (parameter for parameter, rule in rules.items() if rule.update is OptimName.muonclip)


def build_optimizer(
    optim: OptimConfig,
    rules: Rules,
    names: Mapping[nn.Parameter, str],
    chunks: list[DistributedDataParallel],
    encoders: Sequence[EncoderReplica],
    params_dtype: torch.dtype,
    topology: Topology,
) -> SkipNonFiniteOptimizer:
    """AdamW and Muon with float32 masters and state sharded over the ranks with the same weights (ZeRO-1).

    `chunks` and `encoders` have separate buffers for Muon's parameters; `names` are those in the whole model.
    The learning rate is set before each step by `set_learning_rate`. With `optim.offload=cpu`, masters and
    state rest in host memory, and pass through the device in a step.

    Raises `ConfigError` if that is configured and the host has no page-locked memory for it.
    """
    config = OptimizerConfig(
        optimizer="adam",
        # megatron-core recognises a checkpoint's parameter groups by these: with the configured rates, a run
        # could not be resumed with other rates.
        lr=1.0,
        min_lr=0.0,
        clip_grad=optim.grad_clip,
        use_distributed_optimizer=True,
        overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
        bf16=params_dtype is torch.bfloat16,
        params_dtype=params_dtype,
    )
    place = _placement(optim, topology.device)
    optimizers, work = _sharded(
        optim, rules, config, chunks, topology.groups.tp_dp_cp, topology.device, place
    )
    for encoder in encoders:
        # A frozen encoder has no buffers, and nothing to update.
        if encoder.buffers:
            own = work[topology.stage_rank] if work else 0
            everyone, device = topology.everyone, topology.device
            busy = of_all_ranks(own, everyone, device)
            optimizers += _sharded(optim, rules, config, [encoder], everyone, device, place, busy)[0]
    limits = {part.value: optim.of(part).grad_clip for part in ModelPart if part in optim.trained}
    return SkipNonFiniteOptimizer(optimizers, names, limits)


def of_all_ranks(number: int, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """[rank] -> its number; empty in a dry run, which has no peers."""
    if device.type == "meta":
        return []
    numbers = torch.empty(group.size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(numbers, torch.tensor([number], device=device), group=group)
    return numbers.tolist()


def _placement(optim: OptimConfig, device: torch.device) -> Place:
    """Where the state of the rank's optimizers rests."""
    if optim.offload is OptimizerOffload.none:
        return lambda optimizer, part: optimizer
    stream = StateStream(copier_of(device))

    def in_host(optimizer: ShardedOptimizer, part: OptimizerPartition) -> ShardedOptimizer:
        try:
            return HostOptimizer(optimizer, part.build_on_host, stream)
        except HostMemoryError as error:
            raise ConfigError(str(error)) from error

    return in_host


def _sharded(
    optim: OptimConfig,
    rules: Rules,
    config: OptimizerConfig,
    chunks: list[DistributedDataParallel],
    group: dist.ProcessGroup,
    device: torch.device,
    place: Place,
    busy: Sequence[int] = (),
) -> tuple[list[ShardedOptimizer], list[int]]:
    """The optimizers of these chunks, whose dense weights are replicated over `group`, and the Newton-Schulz
    FLOPs per step that each rank of the group ends up with; `busy` are those that it already has."""
    held = {parameter for chunk in chunks for parameter in chunk.parameters()}
    own = {parameter: rule for parameter, rule in rules.items() if parameter in held}
    optimizers: list[ShardedOptimizer] = []
    work = list(busy)
    for part in parts(optim, own, is_encoder=isinstance(chunks[0], EncoderReplica)):
        optimizer = place(shard(part, config, chunks), part)
        if isinstance(optimizer.optimizer, Muon):
            work = bind_matrices(optimizer, own, group, device, work)
        optimizers.append(optimizer)
    return optimizers, work


def parts(optim: OptimConfig, rules: Rules, *, is_encoder: bool) -> Iterator[OptimizerPartition]:
    """The parameters by rule, dense ones and experts apart; the same parts on every rank.

    Dense matrices come before experts, so that owners of experts' matrices are chosen knowing who is busy.
    """
    for is_expert in (False,) if is_encoder else (False, True):
        for update in OptimName:
            names = {optim.of(part).name for part in optim.trained}
            of_experts = {optim.language_model.name} if optim.language_model.trained else set()
            if update in (of_experts if is_expert else {*names, OptimName.adamw}):
                chosen = {
                    parameter: rule
                    for parameter, rule in rules.items()
                    if rule.update is update and is_expert_weight(parameter) is is_expert
                }
                yield _part(optim, update, chosen, is_expert)


def is_expert_weight(parameter: nn.Parameter) -> bool:
    """Whether it is replicated over expert-data-parallel ranks only, as marked for megatron-core."""
    return not getattr(parameter, "allreduce", True)


def _part(optim: OptimConfig, update: OptimName, rules: Rules, is_expert: bool) -> OptimizerPartition:
    groups = list(_groups(optim, rules, is_expert))
    if update is OptimName.muonclip:
        return OptimizerPartition(
            groups=groups,
            is_expert=is_expert,
            build=partial(Muon, store=ResidentStore(), settings=optim.muon),
            build_on_host=partial(Muon, settings=optim.muon),
            state_keys=MUON_STATE_KEYS,
        )
    return OptimizerPartition(
        groups=groups,
        is_expert=is_expert,
        build=partial(_adamw, optim),
        build_on_host=StreamedAdamW,
        state_keys=ADAM_STATE_KEYS,
    )


def _groups(optim: OptimConfig, rules: Rules, is_expert: bool) -> Iterator[dict[str, Any]]:
    """One group per learning rate and decay, empty ones included: all ranks need the same groups."""
    for lr_scale in sorted({optim.of(part).lr_scale for part in optim.trained}):
        for decays in (True, False):
            yield {
                "params": [
                    parameter
                    for parameter, rule in rules.items()
                    if (rule.lr_scale, rule.weight_decay) == (lr_scale, decays)
                ],
                "lr_mult": lr_scale,
                "wd_mult": float(decays),
                "weight_decay": optim.weight_decay * decays,
                "is_expert_parallel": is_expert,
                "is_decoupled_lr": False,
                "default_config": True,
                "max_lr": 1.0,
                "min_lr": 0.0,
            }


def _adamw(optim: OptimConfig, groups: ParamGroups) -> torch.optim.Optimizer:
    """AdamW: Transformer Engine's or Apex's if installed, else torch's."""
    betas = (optim.beta1, optim.beta2)
    if USING_PYTORCH_OPTIMIZER:
        return torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=optim.eps, fused=True)
    return Adam(groups, lr=1.0, betas=betas, eps=optim.eps, adam_w_mode=True)


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    """Use `rate` in the next step, times each parameter group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_mult"]
