"""How long tokens take to their experts and back, by dispatcher; torch-free.

Expected values under balanced routing: each of a token's k experts is on any rank of the expert-parallel
group alike. `alltoall` (NCCL) sends a copy per expert; the others send one per node that has any of them,
and spread it there (DeepEP's README; megatron-core 0.19.2, `fused_a2a.py`).
"""

from dataclasses import dataclass

from k25_train.config.schema import Config
from k25_train.plan.time.expert_copies import copies, copies_elsewhere
from k25_train.plan.time.step import NVLINK_GB_PER_S, network_bytes_per_s
from k25_train.plan.weight_bytes import WEIGHT_BYTES
from k25_train.units import GB
from parallel.communicators import MAX_CTAS
from parallel.dispatcher import Dispatcher

NUM_SMS = 132
"""SMs of an H100 or H800. Source: data sheet."""
DISPATCHER_SMS = {
    Dispatcher.alltoall: MAX_CTAS["ep"],
    Dispatcher.deepep: 20,
    Dispatcher.hybridep: 16,
    Dispatcher.ncclep: 16,
}
"""SMs that an exchange takes from computation. Sources: the limit of the communicator of tokens;
`Buffer.num_sms` of DeepEP; `moe_hybridep_num_sms` of megatron-core 0.19.2; for NCCL EP no figure is
published, HybridEP's is assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertExchange:
    """One exchange (dispatch or combine) of a micro-batch in a layer, for one rank."""

    network_bytes: float
    """Bytes that leave the node."""
    nvlink_bytes: float
    """Bytes to other ranks of the node."""
    received_rows: float
    """Rows that arrive at a rank before they are sorted by expert: its tokens' share of all copies."""
    seconds: float
    """Duration, network and NVLink at the same time."""
    sms: int
    """SMs that it takes meanwhile."""


def expert_exchange(config: Config) -> ExpertExchange:
    """One exchange of a full micro-batch."""
    # 1. Where a token's experts are.
    sizes, model, cluster = config.parallelism, config.model, config.cluster
    tokens = config.train.micro_batch_size * config.train.seq_len
    ep = sizes.ep
    node_ranks = min(ep, cluster.gpus_per_node)
    num_nodes = ep // node_ranks
    row_bytes = model.hidden_size * WEIGHT_BYTES[config.train.dtype]
    # 2. Copies over the network and within nodes, and rows that arrive.
    network = tokens * copies_elsewhere(config, num_nodes, sizes.dispatcher)
    rows = tokens * copies(config, ep, sizes.dispatcher)
    # What has come over the network once is spread in the node, too.
    nvlink = rows * (node_ranks - 1) / (node_ranks if sizes.dispatcher.sends_once_per_node else ep)
    seconds = max(
        network * row_bytes / network_bytes_per_s(config), nvlink * row_bytes / (GB * NVLINK_GB_PER_S)
    )
    sms = sizes.dispatcher_sms or DISPATCHER_SMS[sizes.dispatcher]
    return ExpertExchange(
        network_bytes=network * row_bytes,
        nvlink_bytes=nvlink * row_bytes,
        received_rows=rows,
        seconds=seconds if ep > 1 else 0.0,
        sms=sms,
    )
