"""The parts of a chunk's passes, by kind of layer; torch-free."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from k25_train.plan.kernels.ends import before_mtp, embedding, head
from k25_train.plan.kernels.layer import LayerKernels, PartKernels, kernels_of_kind, part
from k25_train.plan.kernels.work import Phase, Setting
from k25_train.plan.time.expert_exchange import expert_exchange
from k25_train.plan.time.lanes import Resource
from k25_train.plan.time.nodes import (
    Node,
    copy_node,
    counts_node,
    exchange_node,
    joined,
    kernel_node,
    latents_node,
    message_node,
)
from parallel.dispatcher import Dispatcher

LAUNCHES_AFTER_WAIT = 10
"""Kernels that the host launches, once it has seen how many tokens come, before the device has work again.
Assumed."""


class ChunkKind(NamedTuple):
    """What the time of a chunk's passes depends on."""

    num_dense: int
    """Its dense layers, which come first."""
    num_moe: int
    """Its layers with experts."""
    is_first: bool
    """Whether it has the embedding."""
    is_last: bool
    """Whether it has the head, and layers of multi-token prediction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartNodes:
    """One part of a layer, forward and backward."""

    forward: Node
    """In the forward pass."""
    backward: Node
    """In the backward pass, up to the gradient that is passed on."""
    weights: Node
    """Gradients of weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNodes:
    """A decoder layer: three parts, with exchanges between them if it has experts."""

    attention: PartNodes
    experts: PartNodes
    combined: PartNodes
    dispatch: Node
    """To experts: tokens forward, gradients of outputs backward; nothing in a dense layer."""
    combine: Node
    """From experts: outputs forward, gradients of tokens backward."""
    to_host: Node
    """What it saves in the host."""
    from_host: Node
    """The same on its way back."""
    has_router: bool
    """Whether it has experts."""
    wait_s: float
    """How long the device has no work once the host has seen the numbers of tokens."""

    @property
    def forward_share(self) -> float:
        """Share of its forward pass in the time of both, if nothing overlaps."""
        parts = self.attention, self.experts, self.combined
        exchanges_s = self.dispatch.seconds + self.combine.seconds
        forward_s = exchanges_s + sum(each.forward.seconds for each in parts)
        backward_s = exchanges_s + sum(each.backward.seconds + each.weights.seconds for each in parts)
        return forward_s / (forward_s + backward_s) if forward_s else 0.5


@dataclass(frozen=True)
class Device:
    """The nodes of a rank's chunks on one device."""

    setting: Setting
    """What kernels depend on."""

    @cached_property
    def moe(self) -> LayerNodes:
        """A layer with experts."""
        model = self.setting.config.model
        return self._layer(kernels_of_kind(self.setting, model.num_layers - 1, is_moe=True))

    @cached_property
    def dense(self) -> LayerNodes:
        """A layer without."""
        return self._layer(kernels_of_kind(self.setting, 0, is_moe=False))

    @cached_property
    def first(self) -> PartNodes:
        """Ahead of the first layer."""
        return self._part(part(embedding(self.setting)))

    @cached_property
    def last(self) -> PartNodes:
        """After the last layer."""
        return self._part(part(head(self.setting)))

    @cached_property
    def before_mtp(self) -> PartNodes:
        """Ahead of the decoder layer of multi-token prediction."""
        return self._part(part(before_mtp(self.setting)))

    @cached_property
    def message(self) -> Node:
        """Features to the next stage, gradients to the one before."""
        return message_node(self.setting)

    @cached_property
    def latents(self) -> tuple[Node, Node]:
        """What ranks exchange in each layer that share a sequence, forward and backward."""
        return latents_node(self.setting, is_forward=True), latents_node(self.setting, is_forward=False)

    @cached_property
    def counts(self) -> Node:
        """What their routers add up."""
        return counts_node(self.setting)

    def layers(self, kind: ChunkKind) -> list[LayerNodes]:
        """The decoder layers of a chunk, in order."""
        dense = [self.dense] * kind.num_dense if kind.num_dense else []
        return dense + ([self.moe] * kind.num_moe if kind.num_moe else [])

    def _layer(self, kernels: LayerKernels) -> LayerNodes:
        setting, assumptions = self.setting, self.setting.assumptions
        code = assumptions.code
        config, rates = setting.config, setting.config.cluster.rates
        has_exchange = kernels.is_moe and config.parallelism.ep > 1
        dispatch, combine = Node(), Node()
        if has_exchange:
            combine = exchange_node(setting, expert_exchange(config, assumptions))
            sent = expert_exchange(config, assumptions, element_bytes=setting.sent_bytes)
            dispatch = exchange_node(setting, sent)
        # NCCL EP's buffers have a fixed size, and graphs read numbers on the device.
        waits = has_exchange and config.parallelism.dispatcher is not Dispatcher.ncclep
        waits = waits and not (code.cuda_graphs and code.graphs_experts)
        return LayerNodes(
            attention=self._part(kernels.attention),
            experts=self._part(kernels.experts, in_graph=code.graphs_experts),
            combined=self._part(kernels.combined, in_graph=code.graphs_experts),
            dispatch=dispatch,
            combine=combine,
            to_host=copy_node(setting, kernels.host_bytes, Resource.to_host),
            from_host=copy_node(setting, kernels.host_bytes, Resource.from_host),
            has_router=kernels.is_moe,
            wait_s=LAUNCHES_AFTER_WAIT * rates.launch_us / 1e6 if waits else 0.0,
        )

    def _part(self, kernels: PartKernels, *, in_graph: bool = True) -> PartNodes:
        """`in_graph`: whether its kernels are in a graph, if there are graphs."""
        forward, backward, weights = (
            kernel_node(self.setting, kernels.of(phase), in_graph=in_graph)
            for phase in (Phase.forward, Phase.backward, Phase.weights)
        )
        return PartNodes(forward=forward, backward=backward, weights=weights)


def without_delay(nodes: PartNodes) -> Node:
    """A part's backward pass with the gradients of its weights."""
    return joined(nodes.backward, nodes.weights)
