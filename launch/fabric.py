"""Environment variables that ranks need for their network, each with its reason, derived from the cluster."""

import math
from pathlib import Path

from k25_train.config.cluster import Device
from k25_train.config.determinism import deterministic_settings
from k25_train.config.fabric import DETECT, AddressFamily, FabricConfig
from k25_train.config.schema import Config
from k25_train.startup import numa
from launch.variables import Variable, with_site

SOCKET_FAMILIES = {AddressFamily.ipv4: "AF_INET", AddressFamily.ipv6: "AF_INET6"}
"""NCCL's names of the versions of IP."""
ADDRESSES = {AddressFamily.ipv4: "IPv4", AddressFamily.ipv6: "IPv6"}


def environment(config: Config) -> list[Variable]:
    """All variables of a run's ranks but the secret ones, in display order.

    Raises `ConfigError` if the cluster's file contradicts itself.
    """
    return with_site(follow_from(config), config.cluster)


def follow_from(config: Config) -> list[Variable]:
    """Variables that follow from the rest of the configuration."""
    found = [
        Variable("OMP_NUM_THREADS", "1", "ranks share the node's cores; torchrun would set this and warn"),
        Variable("PYTHONUNBUFFERED", "1", "a rank's log shows what it printed before it was killed"),
    ]
    if config.cluster.device is Device.cuda:
        queues = config.parallelism.cuda_queues
        reason = "streams that share a hardware queue serialize; exchanges and overlaps need separate queues"
        found.append(Variable("CUDA_DEVICE_MAX_CONNECTIONS", str(queues), reason))
        reason = "sizes differ in every pass: the allocator grows what it has instead of keeping one of each"
        found.append(Variable("PYTORCH_CUDA_ALLOC_CONF", config.parallelism.cuda_allocator, reason))
        reason = "each rank runs on the CPUs of its GPU's NUMA node, where its page-locked memory then lies"
        found.append(Variable(numa.VARIABLE, numa.TO_GPU, reason))
        found.append(Variable("NCCL_DEBUG", "WARN", "NCCL reports why it fails, and nothing else"))
        found += watchdog_variables(config)
    found += [Variable(*setting) for setting in deterministic_settings(config.train, config.cluster)]
    if config.cluster.fabric is not None:
        found += fabric_variables(config.cluster.fabric)
    slurm = config.cluster.slurm
    if slurm is not None and slurm.container_credentials is not None:
        folder = str(Path(slurm.container_credentials).parent)
        reason = "enroot takes the logins of registries from .credentials in this folder"
        found.append(Variable("ENROOT_CONFIG_PATH", folder, reason))
    return found


def watchdog_variables(config: Config) -> list[Variable]:
    """Limits and records of torch's own watchdog of NCCL (torch 2.13, ProcessGroupNCCL)."""
    limit_s = math.ceil(config.train.collective_timeout_s)
    reason = "a thread that waits for the GPU counts as dead no earlier than collectives time out"
    return [
        Variable("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(limit_s), reason),
        Variable("TORCH_FR_BUFFER_SIZE", "2000", "the last collectives of each rank are kept, for a timeout"),
        Variable("TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "then each rank writes these collectives to a file"),
        Variable("TORCH_FR_DUMP_TEMP_FILE", f"{config.run.dir}/nccl_trace_rank_", "beginning of its name"),
    ]


def fabric_variables(fabric: FabricConfig) -> list[Variable]:
    """Network settings of NCCL and gloo. Source: NCCL's user guide, environment variables."""
    wait_s = 4.096e-6 * 2**fabric.ack_timeout
    found = [
        _nccl_interfaces(fabric),
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
    if fabric.address_family is AddressFamily.ipv6:
        reason = "interfaces may have IPv4 addresses, too, on which nothing routes between nodes"
        found.insert(1, Variable("NCCL_SOCKET_FAMILY", "AF_INET6", reason))
    if fabric.gid_index != DETECT:
        reason = "row of the RoCEv2 address, the same on every device of every node"
        return [*found, Variable("NCCL_IB_GID_INDEX", str(fabric.gid_index), reason)]
    reason = "NCCL searches each device's table for rows of this version; rows differ between nodes"
    return [
        *found,
        Variable("NCCL_IB_ROCE_VERSION_NUM", "2", reason),
        Variable(
            "NCCL_IB_ADDR_FAMILY",
            SOCKET_FAMILIES[fabric.address_family],
            f"of these rows, the one with an {ADDRESSES[fabric.address_family]} address",
        ),
    ]


def _nccl_interfaces(fabric: FabricConfig) -> Variable:
    """Interfaces of NCCL's sockets."""
    if fabric.nccl_interfaces is not None:
        reason = "NCCL's sockets use these interfaces: cluster.fabric.nccl_interfaces"
        return Variable("NCCL_SOCKET_IFNAME", fabric.nccl_interfaces, reason)
    reason = "ranks find each other over this interface; = excludes others with the same prefix"
    if len(fabric.interfaces) > 1:
        reason = "NCCL's sockets use exactly these interfaces; = excludes others with the same prefix"
    return Variable("NCCL_SOCKET_IFNAME", f"={fabric.interface}", reason)
