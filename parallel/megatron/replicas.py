"""Data-parallel replicas of model chunks, with the gradient buffers that ZeRO-1 shards."""

from collections.abc import Callable, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from parallel.megatron.patches.pass_hooks import hooked_finalize
from parallel.topology import Topology


def replicate(
    chunks: Sequence[torch.nn.Module],
    config: TransformerConfig,
    topology: Topology,
    *,
    overlap_grad_reduce: bool = False,
    overlap_param_gather: bool = False,
    bucket_parameters: int | None = None,
) -> list[DistributedDataParallel]:
    """Wrap each chunk so that its gradients are summed in float32 and sharded over data-parallel ranks.

    Also sets, in `config`, how the pipeline schedule finishes the gradients of a step: reduce them,
    update the routers' expert biases, and divide by the number of tokens with a loss in the global batch.

    Args:
        overlap_grad_reduce: reduce each bucket as soon as its gradients are complete, concurrently with the
            backward pass of the others.
        overlap_param_gather: gather updated parameters concurrently with other work, from `start_gather` on;
            the next forward pass waits for each bucket where it first needs it. Between an update and that
            pass parameters are stale: call `complete_parameters` before anything else reads them. Needs
            `overlap_grad_reduce`, without which all parameters are one bucket.
        bucket_parameters: number of parameters after which a bucket is full. None is megatron-core's choice,
            max(40M, 1M x dp): large enough for the bandwidth of the network, not its latency, to count.

    Only the first chunk of the first stage has buckets: elsewhere the reduction of a whole chunk runs
    concurrently with the passes of other chunks, or in the pipeline's bubble.
    """
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
        # `start_gather` starts all buckets together. Upstream starts a bucket when a pass has waited for the
        # one before it, in an order of buckets that is not the order of use where each rule has a buffer.
        align_param_gather=overlap_param_gather,
        bucket_size=bucket_parameters,
        # Lets modules say when the gradients that they own are complete, delayed or not: what is added to
        # `main_grad` directly (`wgrad.py`) never passes through autograd.
        delay_wgrad_compute=True,
    )
    replicas = [
        DistributedDataParallel(
            config=config,
            ddp_config=ddp_config,
            module=chunk,
            pg_collection=topology.groups,
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = hooked_finalize(finalize_model_grads)
    if overlap_grad_reduce:
        _reduce_in_schedule(replicas, config)
    return replicas


class EncoderReplica(DistributedDataParallel):
    """A module that every rank of the job has a replica of, whatever its pipeline stage.

    Gradients are reduced and weights gathered once per step, concurrently with other work: nothing is reduced
    until `start_grad_sync` or `reduce_gradients`, however many backward passes there are.
    """

    def zero_grad_buffer(self) -> None:
        """Begin a step."""
        super().zero_grad_buffer()
        # Tells megatron-core that more gradients will follow.
        for group in self.bucket_groups:
            group.is_last_microbatch = False

    def layers(
        self, pixels: Tensor, grid_thw: tuple[tuple[int, int, int], ...]
    ) -> Sequence[Callable[[Tensor], Tensor]]:
        """The module's layers: the first takes `pixels`, each other one what the one before it returns."""
        return self.module.layers(pixels, grid_thw)


def replicate_everywhere(
    module: torch.nn.Module, config: TransformerConfig, topology: Topology
) -> EncoderReplica:
    """Wrap a module so that its gradients are summed over all ranks, in float32, and sharded over them.

    A frozen module has no gradient buffers, and nothing is ever reduced.
    """
    groups = ProcessGroupCollection()
    groups.dp = groups.dp_cp = topology.everyone
    # The encoder is not split in these directions.
    for name in ("tp", "pp", "ep", "expt_dp"):
        setattr(groups, name, topology.groups.tp)
    return EncoderReplica(
        config=config,
        ddp_config=DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            # `start_gather` starts all buckets together.
            align_param_gather=True,
        ),
        module=module,
        pg_collection=groups,
        disable_bucketing=True,
    )


def reduce_gradients(replica: EncoderReplica, num_tokens: int) -> None:
    """Sum the gradients over all ranks and divide by `num_tokens`, as the backbone's are.

    Each row of patches was encoded by one rank, so the sum needs no other factor.
    """
    for group in replica.bucket_groups:
        # A rank that has encoded nothing has not waited for the previous step's weights yet.
        group.finish_param_sync(skip_next_bucket_dispatch=True)
    replica.finish_grad_sync()
    replica.scale_gradients(1.0 / max(num_tokens, 1))


def _reduce_in_schedule(replicas: list[DistributedDataParallel], config: TransformerConfig) -> None:
    """Let the pipeline schedule start reductions: after a chunk's last micro-batch, on all stages at once.

    A reduction slows concurrent computation down; if all stages start theirs in the same slot, none waits for
    another.
    """
    hold_back = [replica.no_sync for replica in replicas]
    start = [replica.start_grad_sync for replica in replicas]
    alone = len(replicas) == 1
    config.no_sync_func = hold_back[0] if alone else hold_back
    config.grad_sync_func = start[0] if alone else start


@torch.no_grad()
def start_gather(replicas: Sequence[DistributedDataParallel]) -> None:
    """Start to gather parameters that are stale, unless that has started, in the order of `replicas`.

    The next forward pass waits for them. Called by every rank after each update; without overlap nothing is
    stale, and this does nothing.
    """
    for replica in replicas:
        if not replica.ddp_config.overlap_param_gather:
            continue
        for group in replica.bucket_groups + replica.expert_parallel_bucket_groups:
            if not group.param_gather_dispatched:
                group.start_param_sync()


@torch.no_grad()
def complete_parameters(replicas: Sequence[DistributedDataParallel]) -> None:
    """Gather parameters that the last update left stale, before anything but a training pass reads them.

    Called by every rank. Without overlap nothing is stale, and this does nothing.
    """
    for replica in replicas:
        if replica.ddp_config.overlap_param_gather:
            replica.start_param_sync(force_sync=True)
