"""A candidate as a configuration, and as the overrides that lead to it; torch-free."""

from dataclasses import replace

from k25_train.config.activation import ActivationConfig
from k25_train.config.leaves import leaves, plain_values
from k25_train.config.schema import Config
from k25_train.plan.evaluations import with_evaluations
from k25_train.plan.offer import Offer
from k25_train.plan.search.space import Candidate, Choice, Layout
from parallel.config import ContextExchange, DepMode, DepSchedule
from parallel.dispatcher import Dispatcher

EXCHANGE = "parallelism.cp_exchange"
"""Key of how ranks that share sequences exchange latents."""
AS_CONFIGURED = "as configured"
"""Activation policies that are no choice of `conf/activation`."""


def activation_names(config: Config, offer: Offer) -> list[str]:
    """The choices of activation policies: those of `conf/`, and the configured ones if they are none."""
    names = list(offer.activations)
    return names if _name_of(config, offer) in names else [*names, AS_CONFIGURED]


def candidate_of(config: Config, offer: Offer) -> Candidate:
    """The candidate that a configuration is, but for its layout of layers."""
    sizes = config.parallelism
    layout = Layout(
        pp=sizes.pp,
        vpp=sizes.vpp,
        ep=sizes.ep,
        micro_batch_size=config.train.micro_batch_size,
        dispatcher=sizes.dispatcher,
        overlaps=sizes.overlap_expert_comm,
        delays=sizes.delay_wgrad,
        cp=sizes.cp,
        exchange=sizes.cp_exchange,
    )
    choice = Choice(_name_of(config, offer), config.optim.offload, config.dep.mode, config.dep.schedule)
    return Candidate(layout, choice)


def config_of(config: Config, candidate: Candidate, offer: Offer) -> Config:
    """The configuration with a candidate's layout and choices.

    What they do not decide stays as it is, unless it is for another choice: SMs of another dispatcher, a
    layout of other stages, items split where bubbles cannot, evaluations that do not divide.
    """
    layout, choice = candidate.layout, candidate.choice
    sizes, is_same = config.parallelism, config.parallelism.dispatcher is layout.dispatcher
    parallelism = replace(
        sizes,
        pp=layout.pp,
        vpp=layout.vpp,
        ep=layout.ep,
        cp=layout.cp,
        cp_exchange=layout.exchange,
        layout=None,
        dispatcher=layout.dispatcher,
        dispatcher_sms=sizes.dispatcher_sms if is_same else None,
        dispatcher_capacity=sizes.dispatcher_capacity if layout.dispatcher is Dispatcher.ncclep else None,
        overlap_expert_comm=layout.overlaps,
        delay_wgrad=layout.delays,
    )
    in_bubbles = choice.mode is DepMode.decoupled and choice.schedule is DepSchedule.bubbles
    dep = replace(
        config.dep,
        mode=choice.mode,
        schedule=choice.schedule,
        split_items=config.dep.split_items and not in_bubbles,
    )
    train = replace(config.train, micro_batch_size=layout.micro_batch_size)
    activation = config.activation
    if choice.activation != AS_CONFIGURED:
        activation = _with_budgets(offer.activations[choice.activation], config.activation)
    changed = replace(
        config,
        parallelism=parallelism,
        dep=dep,
        train=train,
        activation=activation,
        optim=replace(config.optim, offload=choice.offload),
    )
    return with_evaluations(changed)


def overrides_of(base: Config, config: Config, offer: Offer) -> list[str]:
    """Overrides that lead from one configuration to another, in the schema's order.

    Policies of a choice of `conf/activation` are told as that choice if those of the base are one as well:
    after a choice, policies that were set one by one would still count.
    """
    before, after = dict(leaves(plain_values(base))), dict(leaves(plain_values(config)))
    # What the plan chose of exchanges, an override has to say: it may choose otherwise for another layout.
    told = {EXCHANGE} if config.parallelism.cp > 1 else set()
    changed = {key: value for key, value in after.items() if before.get(key) != value or key in told}
    found = []
    for key, value in changed.items():
        if not _is_policy(key, config):
            found.append(f"{key}={written(value)}")
    policies = [f"{key}={written(value)}" for key, value in changed.items() if _is_policy(key, config)]
    names = _name_of(base, offer), _name_of(config, offer)
    if policies and AS_CONFIGURED not in names:
        policies = [f"activation={names[1]}"]
    return found + policies


def simplicity(candidate: Candidate) -> tuple[int, str]:
    """What decides between candidates that take the same time: fewer mechanisms first, then their names."""
    layout, choice = candidate
    num_mechanisms = (layout.vpp > 1) + (layout.ep > 1) + layout.overlaps + layout.delays
    num_mechanisms += (layout.pp > 1) + (layout.dispatcher is not Dispatcher.alltoall)
    num_mechanisms += (layout.cp > 1) + (layout.exchange is ContextExchange.ring)
    num_mechanisms += (choice.activation != "keep") + (choice.offload.value != "none")
    num_mechanisms += (choice.mode is DepMode.decoupled) + (choice.schedule is DepSchedule.bubbles)
    return num_mechanisms, repr(candidate)


def _name_of(config: Config, offer: Offer) -> str:
    """The choice whose policies are the configured ones."""
    policies = config.activation.policies()
    same = [name for name, each in offer.activations.items() if each.policies() == policies]
    return same[0] if same else AS_CONFIGURED


def _with_budgets(policies: ActivationConfig, budgets: ActivationConfig) -> ActivationConfig:
    return replace(
        policies,
        host_gib=budgets.host_gib,
        host_margin=budgets.host_margin,
        device_gib=budgets.device_gib,
        passes_ahead=budgets.passes_ahead,
    )


def _is_policy(key: str, config: Config) -> bool:
    section, _, name = key.partition(".")
    return section == "activation" and name in config.activation.policies()


def written(value: object) -> str:
    """A value as an override has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
