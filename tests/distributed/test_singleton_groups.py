"""What a group of one skips on the CPU changes no number, and groups of two do not skip it."""

from typing import Any

import pytest
import torch

from tests.helpers.ranks import RankContext, run_ranks

pytestmark = pytest.mark.distributed


def linear_both_ways(context: RankContext) -> dict[str, Any]:
    """Output and gradients of a linear layer, patched and as upstream has it, and what made the outputs."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import layers

    dist.init_process_group("gloo")
    patched = layers.linear_with_grad_accumulation_and_async_allreduce
    found: dict[str, Any] = {}
    for name, linear in (("patched", patched), ("upstream", patched.__wrapped__)):
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randn(6, 1, 8, generator=generator, requires_grad=True)
        weight = torch.randn(4, 8, generator=generator, requires_grad=True)
        flags = {"gradient_accumulation_fusion": False, "allreduce_dgrad": False, "sequence_parallel": False}
        output = linear(tokens, weight, None, **flags, tp_group=dist.group.WORLD)
        output.square().sum().backward()
        found[name] = (output.detach(), tokens.grad, weight.grad)
        found[f"{name} by"] = type(output.grad_fn).__name__
    return found


def share_and_gather(context: RankContext, later: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduce-scatter and all-gather through the functions that the gradient buffers call, waited for at once
    or `later`."""
    import torch.distributed as dist
    from megatron.core.distributed import param_and_grad_buffer as buffers

    dist.init_process_group("gloo")
    world, size = dist.group.WORLD, context.world_size
    gradients = torch.arange(4.0) * (context.rank + 1)
    shard = torch.empty(4 // size)
    parameters = torch.empty(4)
    with buffers._coalescing_manager(world, async_ops=later) as handle:
        buffers.dist_reduce_scatter_func(shard, gradients, op=dist.ReduceOp.SUM, group=world, async_op=later)
    if later:
        handle.wait()
    with buffers._coalescing_manager(world, async_ops=later) as handle:
        buffers.dist_all_gather_func(parameters, shard, group=world, async_op=later)
    if later:
        handle.wait()
    return shard, parameters


def test_a_linear_layer_alone_is_plain_and_equal() -> None:
    (found,) = run_ranks(linear_both_ways, 1)
    assert "LinearWithGradAccumulation" in found["upstream by"]
    assert "LinearWithGradAccumulation" not in found["patched by"]
    for ours, theirs in zip(found["patched"], found["upstream"], strict=True):
        assert torch.equal(ours, theirs)


def test_a_linear_layer_of_two_ranks_is_upstreams() -> None:
    for found in run_ranks(linear_both_ways, 2):
        assert "LinearWithGradAccumulation" in found["patched by"]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_are_summed_and_parameters_gathered(world_size: int, later: bool) -> None:
    expected = torch.arange(4.0) * sum(range(1, world_size + 1))
    results = run_ranks(share_and_gather, world_size, later)
    assert torch.equal(torch.cat([shard for shard, _ in results]), expected)
    assert all(torch.equal(parameters, expected) for _, parameters in results)
