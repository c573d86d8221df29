"""What a group of one skips on the CPU changes no number, and groups of two do not skip it."""

import pytest
import torch

from tests.helpers.ranks import RankContext, run_ranks

pytestmark = pytest.mark.distributed


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


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_are_summed_and_parameters_gathered(world_size: int, later: bool) -> None:
    expected = torch.arange(4.0) * sum(range(1, world_size + 1))
    results = run_ranks(share_and_gather, world_size, later)
    assert torch.equal(torch.cat([shard for shard, _ in results]), expected)
    assert all(torch.equal(parameters, expected) for _, parameters in results)
