"""Variables that a rank needs for its network, each with its reason; they follow from the cluster alone."""

from typing import NamedTuple

from k25_train.config.cluster import DETECT, Device, FabricConfig
from k25_train.config.schema import Config


class Variable(NamedTuple):
    """A variable of the environment that every rank gets."""

    name: str
    value: str
    reason: str
    """Why it has this value, in a line."""


def environment(config: Config) -> list[Variable]:
    """All variables of a run's ranks, in the order in which they are shown."""
    found = [
        Variable("OMP_NUM_THREADS", "1", "ranks share the node's cores; torchrun would set this and warn"),
        Variable("PYTHONUNBUFFERED", "1", "a rank's log shows what it printed before it was killed"),
    ]
    if config.cluster.device is Device.cuda:
        queues = config.parallelism.cuda_queues
        reason = (
            "streams that share a hardware queue wait for each other; exchanges and overlaps need their own"
        )
        found.append(Variable("CUDA_DEVICE_MAX_CONNECTIONS", str(queues), reason))
        found.append(Variable("NCCL_DEBUG", "WARN", "NCCL says why it fails, and nothing else"))
    if config.cluster.fabric is not None:
        found += fabric_variables(config.cluster.fabric)
    return found


def fabric_variables(fabric: FabricConfig) -> list[Variable]:
    """What NCCL and gloo are told of the network. Source: NCCL's user guide, environment variables."""
    wait_s = 4.096e-6 * 2**fabric.ack_timeout
    found = [
        Variable(
            "NCCL_SOCKET_IFNAME",
            f"={fabric.interface}",
            "ranks find each other over this interface; = takes no other whose name begins alike",
        ),
        Variable(
            "GLOO_SOCKET_IFNAME", fabric.interface, "gloo would look up the host name, often a wrong one"
        ),
        Variable(
            "NCCL_IB_HCA",
            "=" + ",".join(fabric.hcas),
            "training uses these devices only; without =, mlx5_1 would take mlx5_10 too",
        ),
        Variable("NCCL_IB_TC", str(fabric.traffic_class), "the switches' lossless queue; 0 drops under load"),
        Variable(
            "NCCL_IB_TIMEOUT",
            str(fabric.ack_timeout),
            f"a lost packet is sent again after {wait_s:.2g} s, so that a link may flap",
        ),
        Variable("NCCL_IB_RETRY_CNT", str(fabric.retries), "times that is tried before a connection fails"),
    ]
    if fabric.gid_index != DETECT:
        reason = "row of the RoCEv2 address, the same on every device of every node"
        return [*found, Variable("NCCL_IB_GID_INDEX", str(fabric.gid_index), reason)]
    reason = "NCCL searches each device's table for the row of this version; rows differ between nodes"
    return [
        *found,
        Variable("NCCL_IB_ROCE_VERSION_NUM", "2", reason),
        Variable("NCCL_IB_ADDR_FAMILY", "AF_INET", "of these rows, the one with an IPv4 address"),
    ]
