"""Parts of passes as tasks on a device: seconds, what takes them, and which resources they use."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from k25_train.config.cluster import Device
from k25_train.config.rates import RatesConfig
from k25_train.plan.cause import Cause
from k25_train.plan.kernels.kernel import Moved
from k25_train.plan.kernels.seconds import kernel_s, moved_s
from k25_train.plan.kernels.work import Setting, Work
from k25_train.plan.time.expert_exchange import ExpertExchange, message_factor
from k25_train.plan.time.lanes import Resource, Shares
from k25_train.plan.time.sequence_exchange import HOP_S, sequence_exchange
from k25_train.units import GB

SMS_OF_MOVING = 0.5
"""Share of SMs that kernels need which only move data: fewer keep the memory busy. Assumed."""
LOST_PER_SM = 1.3
"""Share of their rate that products lose for each share of SMs that an exchange takes: tiles are spread over
all SMs in waves, and those on busy ones come last. Source: Scalable Training of MoE Models with Megatron Core
(arXiv 2603.07685), DeepEP with 20 of 132 SMs costs products a fifth."""
MOST_HELD = 0.9
"""No exchange takes more from products than that."""
OF_CPU = frozenset([Cause.compute])
"""What a CPU's plan counts: the model's products, of which the rate is measured with all the rest in it."""


@dataclass(frozen=True, slots=True)
class Node:
    """A part of a pass that runs on one stream without pause."""

    seconds: float = 0.0
    """Duration alone."""
    causes: Mapping[Cause, float] = field(default_factory=dict)
    """Cause -> its seconds of these."""
    shares: Shares = field(default_factory=dict)
    """What it uses at full rate."""
    held: Shares = field(default_factory=dict)
    """What it takes from everything else."""
    launch_s: float = 0.0
    """How long the host launches its kernels."""

    def times(self, factor: float) -> "Node":
        """The same for so many times longer."""
        causes = {cause: factor * seconds for cause, seconds in self.causes.items()}
        return Node(factor * self.seconds, causes, self.shares, self.held, self.launch_s)

    def as_cause(self, cause: Cause) -> "Node":
        """The same for another cause."""
        return Node(self.seconds, {cause: self.seconds}, self.shares, self.held, self.launch_s)


def joined(*nodes: Node) -> Node:
    """Several nodes of kernels, one after another without pause."""
    seconds = sum(each.seconds for each in nodes)
    causes: dict[Cause, float] = {}
    used: dict[Resource, float] = {}
    for each in nodes:
        for cause, value in each.causes.items():
            causes[cause] = causes.get(cause, 0.0) + value
        for resource, share in each.shares.items():
            used[resource] = used.get(resource, 0.0) + share * each.seconds
    shares = {resource: value / seconds for resource, value in used.items()} if seconds else {}
    return Node(seconds, causes, shares, {}, sum(each.launch_s for each in nodes))


def kernel_node(setting: Setting, works: Iterable[Work], *, in_graph: bool) -> Node:
    """Kernels one after another; in a graph, if there are graphs, the host launches none."""
    config, rates = setting.config, setting.config.cluster.rates
    seconds = sms = memory = 0.0
    launches, causes = 0, dict[Cause, float]()
    for each in works:
        if config.cluster.device is Device.cpu and each.cause not in OF_CPU:
            continue
        kernel = each.kernel
        kernel_seconds = kernel_s(kernel, rates, each.precision)
        seconds += kernel_seconds
        causes[each.cause] = causes.get(each.cause, 0.0) + kernel_seconds
        launches += kernel.num_launches
        sms += kernel_seconds * (SMS_OF_MOVING if isinstance(kernel, Moved) else 1.0)
        memory += moved_s(kernel.num_bytes(each.precision), rates)
    shares = {Resource.sms: sms / seconds, Resource.memory: min(1.0, memory / seconds)} if seconds else {}
    is_launched = not (in_graph and setting.assumptions.code.cuda_graphs)
    launch_s = launches * rates.launch_us / 1e6 * is_launched
    return Node(seconds, causes, shares, {}, launch_s)


def exchange_node(setting: Setting, exchange: ExpertExchange) -> Node:
    """An exchange of tokens, which keeps its SMs however long it takes."""
    rates, seconds = setting.config.cluster.rates, exchange.seconds
    if not seconds:
        return Node()
    moved = 2 * (exchange.network_bytes + exchange.nvlink_bytes)
    shares = {
        Resource.network: exchange.network_s / seconds,
        Resource.nvlink: exchange.nvlink_s / seconds,
        Resource.memory: moved_s(moved, rates) / seconds,
        **pcie_shares(rates, exchange.network_bytes / seconds),
    }
    held = min(MOST_HELD, LOST_PER_SM * exchange.sms / rates.num_sms)
    return Node(seconds, {Cause.experts: seconds}, shares, {Resource.sms: held})


def message_node(setting: Setting) -> Node:
    """A micro-batch's features on their way to the next stage, which is on another node."""
    config = setting.config
    if config.parallelism.pp == 1:
        return Node()
    num_bytes = setting.tokens * config.model.hidden_size * setting.element_bytes
    seconds = message_factor(config) * num_bytes / (GB * config.cluster.network_gb_per_s)
    shares = (
        {Resource.network: 1.0, **pcie_shares(config.cluster.rates, num_bytes / seconds)} if seconds else {}
    )
    return Node(seconds, {Cause.pipeline: seconds}, shares)


def latents_node(setting: Setting, *, is_forward: bool) -> Node:
    """Latents of a layer, which ranks that share a sequence exchange, and backward their gradients."""
    exchange = sequence_exchange(setting, is_forward=is_forward)
    seconds = exchange.seconds
    if not seconds:
        return Node()
    shares = {
        Resource.network: min(1.0, exchange.links.network_s / seconds),
        Resource.nvlink: min(1.0, exchange.links.nvlink_s / seconds),
    }
    return Node(seconds, {Cause.context: seconds}, {key: share for key, share in shares.items() if share})


def counts_node(setting: Setting) -> Node:
    """How many tokens of each sequence a router sends to each expert, added up over ranks that share it."""
    if setting.sizes.cp == 1 or not setting.config.model.balance_loss_coeff:
        return Node()
    return Node(HOP_S, {Cause.context: HOP_S})


def copy_node(setting: Setting, num_bytes: float, resource: Resource) -> Node:
    """Activations on their way to the host or back."""
    config, rates = setting.config, setting.config.cluster.rates
    if not num_bytes or config.cluster.device is Device.cpu:
        return Node()
    gb_per_s = config.cluster.host_copy_gb_per_s
    seconds = num_bytes / (GB * gb_per_s)
    share = min(1.0, gb_per_s / rates.pcie_gb_per_s) if rates.pcie_gb_per_s else 1.0
    shares = {resource: share, Resource.memory: moved_s(num_bytes, rates) / seconds}
    return Node(seconds, {Cause.offload: seconds}, shares)


def pcie_shares(rates: RatesConfig, bytes_per_s: float) -> dict[Resource, float]:
    """What network traffic at this rate takes of a device's link, as much in each direction."""
    if rates.pcie_gb_per_s is None:
        return {}
    share = min(1.0, bytes_per_s / (GB * rates.pcie_gb_per_s))
    return {Resource.to_host: share, Resource.from_host: share}
