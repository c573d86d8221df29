"""Environment variables that ranks need for their network, each with its reason, derived from the cluster."""

from typing import NamedTuple

from k25_train.config.cluster import DETECT, Device, FabricConfig
from k25_train.config.schema import Config


class Variable(NamedTuple):
    """An environment variable of every rank."""

    name: str
    value: str
    reason: str
    """Why the variable has this value, in one line."""


def environment(config: Config) -> list[Variable]:
    """All variables of a run's ranks, in display order."""
    found = [
        Variable("OMP_NUM_THREADS", "1", "ranks share the node's cores; torchrun would set this and warn"),
        Variable("PYTHONUNBUFFERED", "1", "a rank's log shows what it printed before it was killed"),
    ]
    if config.cluster.device is Device.cuda:
        queues = config.parallelism.cuda_queues
        reason = "streams that share a hardware queue serialize; exchanges and overlaps need separate queues"
        found.append(Variable("CUDA_DEVICE_MAX_CONNECTIONS", str(queues), reason))
        found.append(Variable("NCCL_DEBUG", "WARN", "NCCL reports why it fails, and nothing else"))
    if config.cluster.fabric is not None:
        found += fabric_variables(config.cluster.fabric)
    return found


def fabric_variables(fabric: FabricConfig) -> list[Variable]:
    """Network settings of NCCL and gloo. Source: NCCL's user guide, environment variables."""
    wait_s = 4.096e-6 * 2**fabric.ack_timeout
    found = [
        Variable(
            "NCCL_SOCKET_IFNAME",
            f"={fabric.interface}",
            "ranks find each other over this interface; = excludes others with the same prefix",
        ),
        Variable(
            "GLOO_SOCKET_IFNAME",
            fabric.interface,
            "gloo would otherwise resolve the host name, often to a wrong address",
        ),
        Variable(
            "NCCL_IB_HCA",
            "=" + ",".join(fabric.hcas),
            "training uses only these devices; without =, mlx5_1 would match mlx5_10 too",
        ),
        Variable("NCCL_IB_TC", str(fabric.traffic_class), "the switches' lossless queue; 0 drops under load"),
        Variable(
            "NCCL_IB_TIMEOUT",
            str(fabric.ack_timeout),
            f"a lost packet is retransmitted after {wait_s:.2g} s, which tolerates link flaps",
        ),
        Variable("NCCL_IB_RETRY_CNT", str(fabric.retries), "retransmissions before a connection fails"),
    ]
    if fabric.gid_index != DETECT:
        reason = "row of the RoCEv2 address, the same on every device of every node"
        return [*found, Variable("NCCL_IB_GID_INDEX", str(fabric.gid_index), reason)]
    reason = "NCCL searches each device's table for rows of this version; rows differ between nodes"
    return [
        *found,
        Variable("NCCL_IB_ROCE_VERSION_NUM", "2", reason),
        Variable("NCCL_IB_ADDR_FAMILY", "AF_INET", "of these rows, the one with an IPv4 address"),
    ]
