"""What kernels that send tokens to experts need of machines and run (`parallel/dispatcher.py`)."""

from k25_train.config.basics import DType
from k25_train.config.cluster import ClusterConfig, Device
from k25_train.config.training import TrainConfig
from parallel.config import ParallelismConfig, Problem
from parallel.dispatcher import DEEPEP_GPUS, TOKEN_CHUNK, Dispatcher

KEY = "parallelism.dispatcher"
PLAIN = "use alltoall"


def dispatcher_has_kernels(
    train: TrainConfig, cluster: ClusterConfig, parallelism: ParallelismConfig
) -> list[Problem]:
    """The kernels exist for this device, number format and build, and their results are as firm as wanted."""
    kind = parallelism.dispatcher
    if kind is Dispatcher.alltoall:
        return []
    if cluster.device is not Device.cuda:
        rule = f"has kernels for CUDA only, and cluster.device is {cluster.device.value}"
        return [Problem(KEY, kind.value, rule, PLAIN)]
    found = []
    if train.dtype is not DType.bfloat16:
        rule = f"adds up the experts' outputs of bfloat16 only, and train.dtype is {train.dtype.value}"
        found.append(Problem(KEY, kind.value, rule, f"{PLAIN}, or train.dtype=bfloat16"))
    if kind is Dispatcher.ncclep and not train.transformer_engine:
        rule = "is a part of Transformer Engine"
        found.append(Problem(KEY, kind.value, rule, f"{PLAIN}, or train.transformer_engine=true"))
    if train.deterministic:
        rule = (
            "promises no order in which rows arrive, and train.deterministic wants the same bits in every run"
        )
        found.append(Problem(KEY, kind.value, rule, f"{PLAIN}, or train.deterministic=false"))
    return found


def dispatcher_fits_nodes(
    train: TrainConfig, cluster: ClusterConfig, parallelism: ParallelismConfig
) -> list[Problem]:
    """A group of experts is in one node, or fills whole nodes of the size that the kernels know.

    Its ranks are neighbours (`parallel/topology.py`).
    """
    kind, ep, gpus = parallelism.dispatcher, parallelism.ep, cluster.gpus_per_node
    if kind is Dispatcher.alltoall or cluster.device is not Device.cuda:
        return []
    found = []
    if gpus % ep and ep % gpus:
        rule = f"needs groups of experts (ep {ep}) within a node of {gpus} GPUs, or of whole nodes"
        found.append(Problem(KEY, kind.value, rule, f"{PLAIN}, or a divisor or a multiple of {gpus} for ep"))
    elif kind is Dispatcher.deepep and ep > gpus != DEEPEP_GPUS:
        rule = f"works between nodes of {DEEPEP_GPUS} GPUs only, and cluster.gpus_per_node is {gpus}"
        found.append(Problem(KEY, kind.value, rule, f"{PLAIN}, or hybridep, or ep of {gpus} or less"))
    tokens = train.micro_batch_size * train.seq_len
    if kind is Dispatcher.hybridep and tokens % TOKEN_CHUNK:
        rule = f"moves chunks of {TOKEN_CHUNK} tokens, and a micro-batch has {tokens}"
        found.append(
            Problem(KEY, kind.value, rule, f"{PLAIN}, or a multiple of {TOKEN_CHUNK} for train.seq_len")
        )
    return found


RULES = (dispatcher_has_kernels, dispatcher_fits_nodes)
