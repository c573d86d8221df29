"""The order of a pass's parts, or of two overlapped passes', as megatron-core 0.19.2 launches them.

`models/common/model_chunk_schedule_plan.py` runs layer i of a forward pass with layer n - i of another
micro-batch's backward pass:

| stream | | | |
|---|---|---|---|
| exchanges | combine backward | dispatch forward, dispatch backward | combine forward |
| computation | attention forward | experts backward, their weights, experts forward | attention backward |

Nodes of one pass wait for the one before (`ScheduleNode` records an event after each); gradients of weights
wait for nothing and nobody waits for them. The first layer's last ones are computed after its gradient is
sent. A pass alone is the same with one side left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from k25_train.plan.cause import Cause
from k25_train.plan.time.chunk_nodes import ChunkKind, Device, LayerNodes, PartNodes, without_delay
from k25_train.plan.time.lanes import Task
from k25_train.plan.time.nodes import Node
from parallel.config import ContextExchange

COMPUTE, EXCHANGES, LATENTS, MESSAGES = "compute", "exchanges", "latents", "messages"
TO_HOST, FROM_HOST, HOST = "to host", "from host", "host"


@dataclass
class PassProgram:
    """Tasks of one pass or two, in the order in which the host launches them."""

    device: Device
    """Its nodes."""
    tasks: list[Task] = field(default_factory=list)
    """What has been launched."""
    nodes: list[Node] = field(default_factory=list)
    """[task] -> its node."""

    def __post_init__(self) -> None:
        code, sizes = self.device.setting.assumptions.code, self.device.setting.config.parallelism
        self.is_overlapped = False
        self._delays, self._recomputes = sizes.delay_wgrad, code.recomputes_layers
        # A ring sends latents while it attends to those that are there.
        shared = self.device.setting.sizes
        self._hides = shared.cp > 1 and shared.exchange is ContextExchange.ring
        # What the forward and the backward pass, and the host, wait for next.
        self._forward: tuple[int, ...] = ()
        self._backward: tuple[int, ...] = ()
        self._host: int | None = None

    def run(self, forward: ChunkKind | None, backward: ChunkKind | None) -> None:
        """Launch a forward pass, a backward pass, or both overlapped."""
        self.is_overlapped = forward is not None and backward is not None
        device = self.device
        ahead = device.layers(forward) if forward else []
        back = device.layers(backward)[::-1] if backward else []
        # 1. Copies of offloaded tensors go on all the time.
        self._copies(ahead, back)
        # 2. Ends of the model before the first layers.
        if forward and forward.is_first:
            self._ahead(COMPUTE, device.first.forward)
        if backward and backward.is_last:
            self._backward_of(device.last)
            for _ in range(device.setting.assumptions.code.mtp_layers):
                self._mtp_backward()
        # 3. Layer by layer.
        late = Node()
        for number in range(max(len(ahead), len(back))):
            f_layer = ahead[number] if number < len(ahead) else None
            b_layer = back[number] if number < len(back) else None
            late = self._layers(f_layer, b_layer, is_last=number == len(back) - 1) or late
        # 4. Messages, and what is computed meanwhile.
        if forward and forward.is_last:
            for _ in range(device.setting.assumptions.code.mtp_layers):
                self._mtp_forward()
            self._ahead(COMPUTE, device.last.forward)
        elif forward:
            self._message(self._forward)
        if backward and not backward.is_first:
            self._message(self._backward)
        self._free(COMPUTE, late)
        if backward and backward.is_first:
            self._backward_of(device.first)

    def _copies(self, ahead: Sequence[LayerNodes], back: Sequence[LayerNodes]) -> None:
        """Copies while passes run: of other passes, which are as large. Passes that take turns share both
        directions by their durations: what a forward pass saves leaves during a backward pass, too."""
        if self.is_overlapped:
            shares = [(layer, TO_HOST, 1.0) for layer in ahead] + [(layer, FROM_HOST, 1.0) for layer in back]
        else:
            shares = [
                (layer, stream, share)
                for layers, is_forward in ((ahead, True), (back, False))
                for layer in layers
                for share in [layer.forward_share if is_forward else 1 - layer.forward_share]
                for stream in (TO_HOST, FROM_HOST)
            ]
        for layer, stream, share in shares:
            self._free(stream, (layer.to_host if stream == TO_HOST else layer.from_host).times(share))

    def _layers(self, ahead: LayerNodes | None, back: LayerNodes | None, *, is_last: bool) -> Node | None:
        """One layer of each pass; returns the weights' gradients that are left for after the message."""
        late = None
        if back and self._recomputes:
            self._again(back)
        if back:
            self._back(EXCHANGES, back.combined.backward)
            # Gradients of outputs go to the experts, as tokens do.
            self._exchange_back(back.dispatch)
        if ahead:
            self._attention_ahead(ahead)
            self._wait(ahead)
        if back:
            self._back(COMPUTE, back.experts.backward if self._delays else without_delay(back.experts))
        if ahead:
            self._exchange_ahead(ahead.dispatch)
        if back:
            if self._delays:
                self._free(COMPUTE, back.experts.weights)
            self._exchange_back(back.combine)
        if ahead:
            self._ahead(COMPUTE, ahead.experts.forward)
            self._exchange_ahead(ahead.combine)
            self._ahead(EXCHANGES, ahead.combined.forward)
        if back:
            self._attention_back(back)
            if self._delays and is_last:
                late = back.attention.weights
            elif self._delays:
                self._free(COMPUTE, back.attention.weights)
        return late

    def _again(self, layer: LayerNodes) -> None:
        """A layer's forward pass in its backward pass."""
        again = Cause.recompute
        self._back(COMPUTE, layer.attention.forward.as_cause(again))
        self._exchange_back(layer.dispatch)
        self._back(COMPUTE, layer.experts.forward.as_cause(again))
        self._exchange_back(layer.combine)
        self._back(EXCHANGES, layer.combined.forward.as_cause(again))

    def _mtp_forward(self) -> None:
        device = self.device
        self._ahead(COMPUTE, device.before_mtp.forward)
        self._layers(device.moe, None, is_last=False)
        self._ahead(COMPUTE, device.last.forward)

    def _mtp_backward(self) -> None:
        device = self.device
        self._backward_of(device.last)
        self._layers(None, device.moe, is_last=False)
        self._backward_of(device.before_mtp)

    def _backward_of(self, nodes: PartNodes) -> None:
        self._back(COMPUTE, without_delay(nodes))

    def _attention_ahead(self, layer: LayerNodes) -> None:
        before, latents = self._forward, self.device.latents[0]
        if latents.seconds:
            self._ahead(LATENTS, latents)
        sent = self._forward
        if self._hides:
            self._forward = before
        self._ahead(COMPUTE, layer.attention.forward)
        self._forward += sent if self._hides else ()
        if layer.has_router and self.device.counts.seconds:
            self._ahead(LATENTS, self.device.counts)

    def _attention_back(self, layer: LayerNodes) -> None:
        before, latents = self._backward, self.device.latents[1]
        if latents.seconds:
            self._back(LATENTS, latents)
        sent = self._backward
        if self._hides:
            self._backward = before
        self._back(COMPUTE, layer.attention.backward if self._delays else without_delay(layer.attention))
        self._backward += sent if self._hides else ()

    def _exchange_ahead(self, node: Node) -> None:
        if node.seconds:
            self._ahead(EXCHANGES, node)

    def _exchange_back(self, node: Node) -> None:
        if node.seconds:
            self._back(EXCHANGES, node)

    def _wait(self, layer: LayerNodes) -> None:
        """The host waits for the numbers of tokens before it launches anything else."""
        if layer.wait_s:
            self._host = self._add(HOST, Node(layer.wait_s, {Cause.host: layer.wait_s}), self._forward)
            self._forward = (self._host,)

    def _ahead(self, stream: str, node: Node) -> None:
        self._forward = (self._launch(stream, node, self._forward),)

    def _back(self, stream: str, node: Node) -> None:
        self._backward = (self._launch(stream, node, self._backward),)

    def _free(self, stream: str, node: Node) -> None:
        """What waits for nothing but its stream."""
        if node.seconds:
            self._launch(stream, node, ())

    def _message(self, source: tuple[int, ...]) -> None:
        if self.device.message.seconds:
            self._launch(MESSAGES, self.device.message, source)

    def _launch(self, stream: str, node: Node, before: tuple[int, ...]) -> int:
        """A node, and the host's work for it, which takes place while earlier nodes run."""
        launched = () if self._host is None else (self._host,)
        position = self._add(stream, node, (*before, *launched))
        if node.launch_s:
            self._host = self._add(HOST, Node(node.launch_s, {Cause.host: node.launch_s}), launched)
        return position

    def _add(self, stream: str, node: Node, after: tuple[int, ...]) -> int:
        self.tasks.append(Task(stream, node.seconds, node.shares, node.held, after))
        self.nodes.append(node)
        return len(self.tasks) - 1
