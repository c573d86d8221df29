"""All process groups of a run, built once into a frozen object that is passed to its users.

Dense parameters are replicated over `dp` ranks. Experts are spread over `ep` of these `dp` ranks and
replicated over the remaining `expert_dp = dp / ep`. Rank order is the one of megatron-core
(tp-cp-ep-dp-pp): ranks of one pipeline stage are neighbours.
"""

import datetime
import math
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from parallel.config import ParallelismConfig
from parallel.pipeline.layout import PipelineLayout

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The position of this rank in each kind of parallelism, and the groups it communicates in."""

    device: torch.device
    rank: int
    world_size: int
    layout: PipelineLayout
    pp_rank: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    groups: "ProcessGroupCollection"
    """megatron-core's collection of process groups (pp, dp, ep, expt_dp, …)."""
    everyone: dist.ProcessGroup
    """Group of all ranks for the decoupled encoder's weights and gradients, and for exchanges of ranks that
    encode an item together. Communication of one group is in order, hence the separate groups below."""
    features: dist.ProcessGroup
    """Group of all ranks for vision features alone."""
    feature_gradients: dist.ProcessGroup
    """Group of all ranks for gradients of vision features alone."""

    @property
    def pp_size(self) -> int:
        return self.layout.pp

    @property
    def vpp_size(self) -> int:
        return self.layout.vpp

    @property
    def holds_first_chunk(self) -> bool:
        """Whether this rank embeds tokens and, with the coupled tower, encodes images."""
        return self.pp_rank == 0

    @property
    def holds_last_chunk(self) -> bool:
        """Whether this rank computes losses."""
        return self.pp_rank == self.pp_size - 1

    @property
    def first_stage_ranks(self) -> range:
        """[data-parallel rank] -> global rank of the first stage of that replica's pipeline."""
        return range(self.dp_size)

    @property
    def first_stage_rank(self) -> int:
        """Global rank of this pipeline's first stage."""
        return dist.get_global_rank(self.groups.pp, 0)


def backend_of(device: torch.device) -> str:
    """The torch.distributed backend for `device`: nccl on CUDA, gloo on the CPU, a fake one on meta."""
    return {"cuda": "nccl", "cpu": "gloo", "meta": "fake"}[device.type]


def start_process_group(
    device: torch.device,
    timeout_s: float,
    store: dist.Store | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Form the group of all ranks of the job. A rank that waits longer than `timeout_s` for a peer raises
    instead of hanging.

    Args:
        device: decides the backend.
        timeout_s: time limit of collectives.
        store: through which the ranks have found each other; None if torch shall find them by the
            environment.
        rank, world_size: this rank's place; read from the environment without a store.
    """
    _listen_on_loopback_if_alone()
    dist.init_process_group(
        backend=backend_of(device),
        timeout=datetime.timedelta(seconds=timeout_s),
        store=store,
        rank=-1 if store is None else rank,
        world_size=-1 if store is None else world_size,
    )


def _listen_on_loopback_if_alone() -> None:
    """Have the ranks of a job on one host listen where this host alone reaches them.

    Else gloo and NCCL listen on the address of the host's name, or on the first interface. What is set stays.
    """
    is_one_host = os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1")
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if is_one_host and loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback[0])


def job_store() -> dist.Store:
    """A separate connection to the store through which the ranks of the job have found each other."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


def build_topology(
    sizes: ParallelismConfig, layout: PipelineLayout, device: torch.device, timeout_s: float = 1800.0
) -> Topology:
    """Fill megatron-core's parallel state, the only place that does, and read the groups back.

    Needs a started process group whose size is a multiple of `pp`; `ep` must divide the rest. Groups do not
    inherit its timeout: they get `timeout_s`, megatron-core's in whole minutes.
    """
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=sizes.pp,
        virtual_pipeline_model_parallel_size=sizes.vpp if sizes.vpp > 1 else None,
        expert_model_parallel_size=sizes.ep,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()

    # The encoder's groups are formed in the same order on every rank: forming one is collective.
    def group_of_all(description: str) -> dist.ProcessGroup:
        return dist.new_group(timeout=datetime.timedelta(seconds=timeout_s), group_desc=description)

    return Topology(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        layout=layout,
        pp_rank=groups.pp.rank(),
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        ep_rank=groups.ep.rank(),
        ep_size=groups.ep.size(),
        groups=groups,
        everyone=group_of_all("VISION_GROUP"),
        features=group_of_all("VISION_FEATURES_GROUP"),
        feature_gradients=group_of_all("VISION_FEATURE_GRADIENTS_GROUP"),
    )


def stop_process_group() -> None:
    """Leave the job: megatron-core's state first, then torch's."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
