"""All process groups of a run, built once into a frozen object that is passed to its users.

The ranks of a stage, `dp * cp` of them, hold the same dense parameters: `dp` replicas of the pipeline with
sequences of their own, each on `cp` ranks that share the tokens. Experts are spread over `ep` of a stage's
ranks and replicated over the remaining `expert_dp = dp * cp / ep`. Rank order is the one of megatron-core
(tp-cp-ep-dp-pp): ranks of one pipeline stage are neighbours, and among them those that share sequences.
"""

import datetime
import json
import math
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from parallel.communicators import MAX_CTAS
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
    """Replica of the pipeline."""
    dp_size: int
    cp_rank: int
    """Place among the ranks that share the replica's sequences."""
    cp_size: int
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
    """Group of all ranks for gradients of vision features alone; `features` itself where all features of a
    step precede all gradients."""

    def group(self, name: str) -> dist.ProcessGroup:
        """The group of a `Communicator`: `world`, a field of this object, or of megatron-core's
        collection."""
        if name == "world":
            return dist.distributed_c10d._get_default_group()
        own = name in ("everyone", "features", "feature_gradients")
        found: dist.ProcessGroup = getattr(self if own else self.groups, name)
        return found

    @property
    def pp_size(self) -> int:
        return self.layout.pp

    @property
    def vpp_size(self) -> int:
        return self.layout.vpp

    @property
    def stage_size(self) -> int:
        """Ranks of a stage, over which dense weights are replicated."""
        return self.dp_size * self.cp_size

    @property
    def stage_rank(self) -> int:
        """Place among the ranks of the stage."""
        return self.dp_rank * self.cp_size + self.cp_rank

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
        """Global ranks of the first stage, those of a replica next to one another."""
        return range(self.stage_size)


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
    instead of hanging. On CUDA the ranks connect at once, so that a broken network shows here, in seconds.

    Args:
        device: decides the backend.
        timeout_s: time limit of collectives.
        store: through which the ranks have found each other; None if torch shall find them by the
            environment.
        rank, world_size: this rank's place; read from the environment without a store.
    """
    _listen_on_loopback_if_alone()
    is_cuda = device.type == "cuda"
    dist.init_process_group(
        backend=backend_of(device),
        timeout=datetime.timedelta(seconds=timeout_s),
        store=store,
        rank=-1 if store is None else rank,
        world_size=-1 if store is None else world_size,
        pg_options=nccl_options("world") if is_cuda else None,
        device_id=device if is_cuda else None,
    )
    if is_cuda:
        _release_device()


def _release_device() -> None:
    """Have groups that are formed from now on connect when they are first used.

    While the default group is bound to a device, torch 2.13 (`_new_process_group_helper`) forms every other
    one by splitting it: all ranks of the job take part in each split, members or not, of which megatron-core
    asks for 26,000 at 4,096 ranks, most of them of one rank; each rank ends up with some twenty communicators
    instead of the ones that it uses; and unbatched sends share their group's communicator, in which those of
    a pipeline would wait for each other. The binding itself is only read there and by `barrier`.
    """
    dist.distributed_c10d._get_default_group().bound_device_id = None


def nccl_options(key: str) -> Any:
    """Options of a communicator: a key of `MAX_CTAS`. Each group needs an object of its own: torch writes
    the group's name and ranks into it."""
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = MAX_CTAS[key]
    return options


@contextmanager
def _options_file(device: torch.device) -> Iterator[str | None]:
    """A file from which megatron-core reads the options of its groups; None where there is no NCCL."""
    if device.type != "cuda":
        yield None
        return
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        # JSON is YAML. Keys of ours are ignored.
        json.dump({key: {"max_ctas": most} for key, most in MAX_CTAS.items()}, file)
        file.flush()
        yield file.name


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
    sizes: ParallelismConfig,
    layout: PipelineLayout,
    device: torch.device,
    timeout_s: float = 1800.0,
    *,
    separates_gradients: bool = True,
) -> Topology:
    """Fill megatron-core's parallel state, the only place that does, and read the groups back.

    Needs a started process group whose size is a multiple of `pp * cp`; `ep` must divide a stage's ranks.
    Groups do not inherit its timeout: they get `timeout_s`, megatron-core's in whole minutes.
    `separates_gradients` says whether gradients of features have a group of their own.
    """
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    with _options_file(device) as options:
        parallel_state.initialize_model_parallel(
            pipeline_model_parallel_size=sizes.pp,
            virtual_pipeline_model_parallel_size=sizes.vpp if sizes.vpp > 1 else None,
            expert_model_parallel_size=sizes.ep,
            context_parallel_size=sizes.cp,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=math.ceil(timeout_s / 60),
            nccl_communicator_config_path=options,
        )
    _share_groups(parallel_state)
    groups = ProcessGroupCollection.use_mpu_process_groups()

    # The encoder's groups are formed in the same order on every rank: forming one is collective.
    def group_of_all(description: str, key: str) -> dist.ProcessGroup:
        return dist.new_group(
            timeout=datetime.timedelta(seconds=timeout_s),
            pg_options=nccl_options(key) if device.type == "cuda" else None,
            group_desc=description,
        )

    everyone = group_of_all("VISION_GROUP", "everyone")
    features = group_of_all("VISION_FEATURES_GROUP", "features")
    gradients = features
    if separates_gradients:
        gradients = group_of_all("VISION_FEATURE_GRADIENTS_GROUP", "feature_gradients")
    return Topology(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        layout=layout,
        pp_rank=groups.pp.rank(),
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        cp_rank=groups.cp.rank(),
        cp_size=groups.cp.size(),
        ep_rank=groups.ep.rank(),
        ep_size=groups.ep.size(),
        groups=groups,
        everyone=everyone,
        features=features,
        feature_gradients=gradients,
    )


def _share_groups(parallel_state: Any) -> None:
    """Let groups of the same ranks be one where what they carry never overlaps: each that is used would
    become a communicator of its own, with buffers on the GPU and connections to its ranks.

    Expert biases follow the counts of their step, the gradient norm is a figure like others. Weights and
    gradients keep their group apart from counts, for which the host waits while weights are gathered. Tensors
    are not split here (tp = 1); where contexts are, the group of replicas has fewer ranks than a stage.
    """
    if parallel_state.get_context_parallel_world_size() == 1:
        parallel_state._TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP = parallel_state._DATA_PARALLEL_GROUP
    everyone = dist.distributed_c10d._get_default_group()
    parallel_state._INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP = everyone


def stop_process_group() -> None:
    """Leave the job: megatron-core's state first, then torch's."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
