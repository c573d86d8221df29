"""The way that `rollout.transport` names.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

import socket

from k25_train.config.rollout import EngineKind, RolloutConfig, Transport
from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from k25_train.rl.transports.base import Waiting, Way, WeightTransport
from k25_train.rl.transports.checkpoint_engine import CheckpointEngineWay, ask_vllm, parameter_server
from k25_train.rl.transports.gathered import GatheredWay
from k25_train.rl.transports.in_memory import InMemory
from k25_train.rl.transports.nccl import NcclWay, StreamSource, vllm_sender
from k25_train.rl.transports.shared_memory import SharedMemory
from k25_train.rollout.engines.pool import EnginePool
from parallel.topology import Topology


def build_way(config: Config, topology: Topology, pool: EnginePool | None, wait: Waiting) -> Way:
    """The way of a run's weights. Called by every rank.

    Args:
        config: of the run.
        topology: of this rank.
        pool: the engines, on the first rank; None on others.
        wait: runs calls of engines, on the first rank.

    Raises `ConfigError` for a way that this machine, or this engine, does not have.
    """
    rollout = config.rollout
    assert rollout is not None, "a run of reinforcement learning"
    if rollout.engine is EngineKind.in_process or rollout.transport is Transport.shared_memory:
        return GatheredWay(_files_or_tensors(rollout), pool, wait)
    if rollout.engine is not EngineKind.vllm or topology.device.type != "cuda":
        raise ConfigError(
            f"rollout.transport={rollout.transport.value}: is from GPUs to those of vLLM, not to "
            f"rollout.engine={rollout.engine.value} from a {topology.device.type} trainer; use "
            "rollout.transport=shared_memory"
        )
    if rollout.transport is Transport.checkpoint_engine:
        # Engines have the GPUs of the ranks, in order: several ranks may share a server.
        url = rollout.urls[topology.rank * len(rollout.urls) // topology.world_size]
        ask = ask_vllm(url, rollout.update_timeout_s)
        return CheckpointEngineWay(parameter_server(), ask, pool, wait)
    sender = vllm_sender(rollout.urls, socket.gethostname(), rollout.update_timeout_s)
    return NcclWay(pool, wait, StreamSource(topology.device), sender)


def _files_or_tensors(rollout: RolloutConfig) -> WeightTransport:
    return InMemory() if rollout.engine is EngineKind.in_process else SharedMemory()
