"""Data-parallel replicas of model chunks, with the gradient buffers that ZeRO-1 shards."""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig

from parallel.topology import Topology


def replicate(
    chunks: Sequence[torch.nn.Module], config: TransformerConfig, topology: Topology
) -> list[DistributedDataParallel]:
    """Wrap each chunk so that its gradients are summed in float32 and sharded over data-parallel ranks.

    Also tells the pipeline schedule, through `config`, how to finish the gradients of a step: reduce them,
    update the routers' expert biases, and divide by the number of tokens with a loss in the global batch.
    """
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        delay_wgrad_compute=config.delay_wgrad_compute,
    )
    config.finalize_model_grads_func = finalize_model_grads
    return [
        DistributedDataParallel(
            config=config, ddp_config=ddp_config, module=chunk, pg_collection=topology.groups
        )
        for chunk in chunks
    ]
