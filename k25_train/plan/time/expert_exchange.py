"""How long tokens take to their experts and back, by dispatcher; torch-free.

Expected values under balanced routing: each of a token's k experts is on any rank of the expert-parallel
group alike. `alltoall` (NCCL) sends a copy per expert; the others send one per node that has any of them,
and spread it there (DeepEP's README; megatron-core 0.19.2, `fused_a2a.py`). What NVLink connects, a node or a
rack, counts as a node. A busiest rank gets as many times more as `Assumptions.expert_imbalance` says.
"""

from dataclasses import dataclass, replace

from k25_train.config.schema import Config
from k25_train.plan.assumptions import AS_CONFIGURED, Assumptions
from k25_train.plan.expert_copies import EXCHANGES, copies, copies_elsewhere
from k25_train.plan.weight_bytes import WEIGHT_BYTES
from k25_train.units import GB
from parallel.communicators import MAX_CTAS
from parallel.dispatcher import Dispatcher

DISPATCHER_SMS = {
    Dispatcher.alltoall: MAX_CTAS["ep"],
    Dispatcher.deepep: 20,
    Dispatcher.hybridep: 16,
    Dispatcher.ncclep: 16,
}
"""SMs that an exchange takes from computation. Sources: the limit of the communicator of tokens;
`Buffer.num_sms` of DeepEP; `moe_hybridep_num_sms` of megatron-core 0.19.2; for NCCL EP no figure is
published, HybridEP's is assumed."""
NETWORK_SHARE = 0.85
"""Share of the card's rate that exchanges reach. Sources: DeepEP's README, 16 ranks on 2 nodes, 43 of
50 GB/s; Scalable Training of MoE Models with Megatron Core (arXiv 2603.07685), 4,096 tokens of
DeepSeek-V3's shape: all-to-all over 64 ranks 9.16 ms where the card needs 8.2, over 16 ranks 5.77 where it
needs 4.7."""
MOST_OF_NODE = 8
"""Devices that NVLink connects within one node at most; where it connects more, it connects nodes (NVL72)."""
START_S = 200e-6
"""What an exchange takes whatever its size: ranks find out who sends what, and buffers are taken. Source:
HybridEP's benchmarks (DeepEP, docs/README_Hybrid-EP.md), through torch less its kernel alone: 0.16 ms on 8
B200, 0.2 on 32 GB200, 0.5 on 16 H100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertExchange:
    """One exchange (dispatch or combine) of a micro-batch in a layer, for one rank."""

    network_bytes: float
    """Bytes that leave the node, or the rack if NVLink connects it."""
    nvlink_bytes: float
    """Bytes to other ranks of the node."""
    received_rows: float
    """Rows that arrive at a rank before they are sorted by expert: its tokens' share of all copies."""
    network_s: float
    """How long the network needs if nothing else does."""
    nvlink_s: float
    """The same of NVLink."""
    seconds: float
    """Duration, network and NVLink at the same time."""
    sms: int
    """SMs that it takes meanwhile."""


def expert_exchange(
    config: Config, assumptions: Assumptions = AS_CONFIGURED, *, element_bytes: int | None = None
) -> ExpertExchange:
    """One exchange of a full micro-batch.

    Args:
        config: the configuration.
        assumptions: how uneven experts are.
        element_bytes: of what is sent; that of `train.dtype` if None.
    """
    # 1. Where a token's experts are.
    sizes, model, rates = config.parallelism, config.model, config.cluster.rates
    tokens = config.train.micro_batch_size * config.train.seq_len / sizes.cp
    ep = sizes.ep
    node_ranks = nvlink_ranks(config, ep)
    num_nodes = ep // node_ranks
    row_bytes = model.hidden_size * (element_bytes or WEIGHT_BYTES[config.train.dtype])
    # 2. Copies over the network and within nodes, and rows that arrive.
    in_turn = assumptions.code.routes_in_turn
    leaving = copies_elsewhere(config, num_nodes, sizes.dispatcher, routes_in_turn=in_turn)
    most = assumptions.code.most_nodes
    if most is not None and sizes.dispatcher.sends_once_per_node:
        leaving = min(leaving, most * (num_nodes - 1) / num_nodes)
    network = tokens * leaving
    rows = tokens * copies(config, ep, sizes.dispatcher, routes_in_turn=in_turn)
    # What has come over the network once is spread in the node, too.
    nvlink = rows * (node_ranks - 1) / (node_ranks if sizes.dispatcher.sends_once_per_node else ep)
    # 3. Durations; the busiest rank's, for which the others wait.
    busiest = assumptions.expert_imbalance * message_factor(config)
    network_s = busiest * network * row_bytes / (GB * NETWORK_SHARE * config.cluster.network_gb_per_s)
    nvlink_s = busiest * nvlink * row_bytes / (GB * rates.nvlink_gb_per_s) if rates.nvlink_gb_per_s else 0.0
    longest_s = max(network_s, nvlink_s)
    sms = sizes.dispatcher_sms or DISPATCHER_SMS[sizes.dispatcher]
    return ExpertExchange(
        network_bytes=network * row_bytes,
        nvlink_bytes=nvlink * row_bytes,
        received_rows=rows,
        network_s=network_s,
        nvlink_s=nvlink_s,
        seconds=longest_s + START_S * message_factor(config) if longest_s else 0.0,
        sms=sms,
    )


def between_nodes(config: Config, dispatcher: Dispatcher) -> tuple[float, float]:
    """Bytes that a rank sends over the network in a step, of tokens on their way to experts and back, and
    seconds that its card takes for them; on average over stages."""
    sizes = replace(config.parallelism, dispatcher=dispatcher, dispatcher_sms=None)
    each = expert_exchange(replace(config, parallelism=sizes))
    times = EXCHANGES * config.model.num_moe_layers * config.num_micro_batches / sizes.pp
    return times * each.network_bytes, times * each.network_s


def message_factor(config: Config) -> float:
    """Factor on the duration of messages."""
    return config.cluster.rates.calibration.exchange


def nvlink_ranks(config: Config, group: int) -> int:
    """Of neighbouring ranks in a group of this size, those that NVLink connects: the most that divide it."""
    rates, node = config.cluster.rates, config.cluster.gpus_per_node
    # Where NVLink connects a rack, a node is a part of it; otherwise nodes may have fewer devices than usual.
    domain = rates.nvlink_ranks if rates.nvlink_ranks > MOST_OF_NODE else min(rates.nvlink_ranks, node)
    return next(size for size in range(min(group, domain), 0, -1) if group % size == 0)
