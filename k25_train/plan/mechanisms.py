"""The mechanisms of a configuration, each switched the other way: what it is worth; torch-free."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from k25_train.config.optimizer import OptimizerOffload
from k25_train.config.schema import Config
from k25_train.plan.offer import Offer
from parallel.activations.policy import Policy
from parallel.config import DepMode, DepSchedule
from parallel.dispatcher import Dispatcher

WITHOUT = {
    "FP8 storage": {Policy.fp8: Policy.keep, Policy.fp8_offload: Policy.offload},
    "activation offload": {Policy.offload: Policy.keep, Policy.fp8_offload: Policy.fp8},
    "recomputation": {Policy.recompute: Policy.keep},
}
"""What is done with activations -> what each policy is without it."""


def mechanisms_of(config: Config, offer: Offer) -> Iterator[tuple[str, Config]]:
    """The configuration itself, then without or with each mechanism: (what is otherwise, configuration)."""
    yield "as configured", config
    yield from _of_schedule(config)
    yield from _of_activations(config)
    yield from _of_encoder(config)
    is_off = config.optim.offload is OptimizerOffload.none
    other = OptimizerOffload.cpu if is_off else OptimizerOffload.none
    word = "with" if is_off else "without"
    yield f"{word} optimizer state in the host", replace(config, optim=replace(config.optim, offload=other))


def _of_schedule(config: Config) -> Iterator[tuple[str, Config]]:
    """Virtual stages, overlap, delayed weight gradients, and the dispatcher."""
    sizes = config.parallelism

    def changed(name: str, **keys: Any) -> tuple[str, Config]:
        return name, replace(config, parallelism=replace(sizes, **keys))

    if sizes.overlap_expert_comm:
        yield changed("without overlapped exchanges", overlap_expert_comm=False, delay_wgrad=False)
        word = "without" if sizes.delay_wgrad else "with"
        yield changed(f"{word} delayed weight gradients", delay_wgrad=not sizes.delay_wgrad)
    elif sizes.ep > 1 and (sizes.vpp > 1 or sizes.pp == 1):
        yield changed("with overlapped exchanges", overlap_expert_comm=True)
        yield changed("and delayed weight gradients", overlap_expert_comm=True, delay_wgrad=True)
    if sizes.vpp > 1:
        off = {"overlap_expert_comm": False, "delay_wgrad": False, "layout": None}
        yield changed("without virtual stages", vpp=1, **off)
    if sizes.overlap_grad_reduce:
        off = {"overlap_grad_reduce": False, "overlap_param_gather": False}
        yield changed("without overlapped gradients and weights", **off)
    if sizes.ep > 1:
        for dispatcher in Dispatcher:
            # NCCL EP needs to be told how many rows a rank may get.
            if dispatcher not in (sizes.dispatcher, Dispatcher.ncclep):
                keys = {"dispatcher_sms": None, "dispatcher_capacity": None}
                yield changed(f"with {dispatcher.value}", dispatcher=dispatcher, **keys)


def _of_activations(config: Config) -> Iterator[tuple[str, Config]]:
    """Activations without each thing that is done with them, and with nothing of it."""
    for name, instead in WITHOUT.items():
        section = _replaced(config.activation, instead)
        if section != config.activation:
            yield f"without {name}", replace(config, activation=section)
    every = dict.fromkeys(Policy, Policy.keep)
    section = _replaced(config.activation, every)
    if section != config.activation:
        yield "with all activations kept", replace(config, activation=section)


def _of_encoder(config: Config) -> Iterator[tuple[str, Config]]:
    """The vision tower in other places."""
    for name, mode, schedule in (
        ("with the tower in the first stage", DepMode.coupled, DepSchedule.upfront),
        ("with the tower ahead of the pipeline", DepMode.decoupled, DepSchedule.upfront),
        ("with the tower in bubbles", DepMode.decoupled, DepSchedule.bubbles),
    ):
        is_same = config.dep.mode is mode and (mode is DepMode.coupled or config.dep.schedule is schedule)
        if not is_same:
            dep = replace(config.dep, mode=mode, schedule=schedule, split_items=False)
            yield name, replace(config, dep=dep)


def _replaced(section: Any, instead: dict[Policy, Policy]) -> Any:
    """A section of activations in which policies are replaced."""
    changed = {}
    for name in section.__dataclass_fields__:
        value = getattr(section, name)
        if isinstance(value, Policy):
            changed[name] = instead.get(value, value)
        elif hasattr(value, "__dataclass_fields__"):
            changed[name] = _replaced(value, instead)
    return replace(section, **changed)
