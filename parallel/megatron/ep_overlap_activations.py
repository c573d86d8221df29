"""Activation policies in megatron-core's overlapped schedule, which runs a pass in nodes.

A node is a part of a layer with its own graph: it detaches its inputs and holds them, with its outputs, for
its backward pass, which reads only their gradients and history. Policies are meant to free that memory, so it
is released here when the layer is complete. megatron-core releases some of it (`should_free_input`) by
resizing the storage to zero, which would also empty what policies have saved of it for the backward pass.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

from megatron.core.pipeline_parallel.utils import NoopScheduleNode, get_comm_stream
from torch import Tensor

from parallel.activations.saving_pass import SavingPass
from parallel.activations.storage import deallocate_data


def save_by_policy(plan: Any, saving: SavingPass, hold_output: Callable[[Tensor], None]) -> None:
    """Let the forward nodes of a pass's plan save as `saving` says, and hold no other activations.

    Args:
        hold_output: called with the output that is sent to the next stage.
    """
    # 1. Every node saves by policy.
    layers = [_nodes_of(plan.get_layer(number)) for number in range(plan.num_layers())]
    for node in (plan.pre_process, *chain.from_iterable(layers), plan.post_process):
        if node is not None:
            node.forward_func = _saving(node.forward_func, saving)
    # 2. The last node of each layer releases what the layer's nodes hold.
    before = plan.pre_process
    for nodes in layers:
        is_sent = nodes is layers[-1] and plan.post_process is None
        nodes[-1].set_post_forward_hook(
            partial(_release, plan, before, nodes, hold_output if is_sent else None)
        )
        before = nodes[-1]


def _nodes_of(layer: Any) -> list[Any]:
    """A layer's nodes in order, without those that do nothing."""
    nodes = (layer.pre_dispatch_computation, layer.moe_dispatch, layer.mlp, layer.moe_combine)
    return [node for node in nodes if not isinstance(node, NoopScheduleNode)]


def _release(
    plan: Any, before: Any, nodes: Sequence[Any], hold_output: Callable[[Tensor], None] | None
) -> None:
    """Free what a layer's nodes hold, once all of them have run, except for the output of the last.

    Args:
        before: the node whose output the layer has read.
        hold_output: called with the output of the last node, if that is sent.
    """
    held = [before.output, *(node.output for node in nodes[:-1])]
    held += [(*node.inputs, *node.detached, *node.before_detached) for node in nodes]
    for tensor in chain.from_iterable(each if isinstance(each, tuple) else (each,) for each in held):
        if isinstance(tensor, Tensor):
            for node in nodes:
                # Otherwise its memory could be reused while a node on another stream still reads it.
                tensor.record_stream(node.stream)
            deallocate_data(tensor)
    plan.state.decoder_input = None
    if hold_output is not None:
        # The stream that it is sent from may not be the one that it was computed on.
        nodes[-1].output.record_stream(get_comm_stream())
        hold_output(nodes[-1].output)


def _saving(run: Callable[..., Any], saving: SavingPass) -> Callable[..., Any]:
    def forward(*inputs: Any) -> Any:
        with saving.active():
            return run(*inputs)

    return forward
