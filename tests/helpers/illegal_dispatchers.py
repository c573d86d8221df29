"""Ways to choose a dispatcher of tokens that this job, or these machines, cannot run."""

from collections.abc import Callable

from tests.helpers.legal_config import Broken, Legal, Values

DISPATCHER = "parallelism.dispatcher"
TWO_NODES: Values = {
    "cluster.device": "cuda", "cluster.rates.memory_gb": 80, "cluster.nodes": 2, "cluster.gpus_per_node": 8,
    "parallelism.pp": 1, "parallelism.vpp": 1, "parallelism.ep": 16, "parallelism.layout": None,
    "parallelism.overlap_expert_comm": False, "parallelism.delay_wgrad": False, "model.num_experts": 32,
    "train.dtype": "bfloat16", "train.micro_batch_size": 1, "train.global_batch_size": 16,
    "train.eval_sequences": 16, "train.seq_len": 256, DISPATCHER: "deepep",
}  # fmt: skip
"""A legal configuration of two nodes with eight GPUs each, whose experts are spread over both."""


def broken(rule: str, key: str = DISPATCHER, **changes: object) -> Callable[[Legal], Broken]:
    """`TWO_NODES` with changes, `section__key`."""
    return lambda _legal: (
        TWO_NODES | {name.replace("__", "."): to for name, to in changes.items()},
        key,
        rule,
    )


FEWER: Values = {"model__num_experts": 12, "train__global_batch_size": 12, "train__eval_sequences": 12}
"""Sizes that twelve ranks divide."""
SMS, CAPACITY = "parallelism.dispatcher_sms", "parallelism.dispatcher_capacity"
DISPATCHER_BREAKS: dict[str, Callable[[Legal], Broken]] = {
    "dispatcher at ep=1": broken("needs experts spread over ranks", parallelism__ep=1),
    "groups unknown to DeepEP": broken(
        "has no settings for expert groups of 12 ranks",
        parallelism__ep=12, cluster__gpus_per_node=6, **FEWER,
    ),
    "dispatcher on the CPU": broken(
        "has kernels for CUDA only", cluster__device="cpu", cluster__rates__memory_gb=None
    ),
    "dispatcher in float32": broken("of bfloat16 only", train__dtype="float32"),
    "NCCL EP without Transformer Engine": broken(
        "is a part of Transformer Engine",
        parallelism__dispatcher="ncclep", parallelism__dispatcher_capacity=2,
    ),
    "dispatcher in any order": broken("promises no order", train__deterministic=True),
    "groups across nodes": broken(
        "within a node of 6 GPUs, or of whole nodes",
        parallelism__ep=4, cluster__gpus_per_node=6, **FEWER,
    ),
    "small nodes of DeepEP": broken(
        "works between nodes of 8 GPUs only", cluster__nodes=4, cluster__gpus_per_node=4
    ),
    "chunks of HybridEP": broken(
        "moves chunks of 64 tokens", parallelism__dispatcher="hybridep", train__seq_len=250
    ),
    "SMs of NCCL": broken(
        "is for deepep, hybridep and ncclep", SMS,
        parallelism__dispatcher="alltoall", parallelism__dispatcher_sms=16,
    ),
    "more SMs than there are": broken("must leave room", SMS, parallelism__dispatcher_sms=96),
    "odd number of SMs": broken("must be even and positive", SMS, parallelism__dispatcher_sms=7),
    "capacity of DeepEP": broken("is for ncclep", CAPACITY, parallelism__dispatcher_capacity=2),
    "no capacity": broken("must be 1 or more", CAPACITY, parallelism__dispatcher="ncclep"),
}  # fmt: skip
