"""Sizes of the parallel layout, and `Problem`, in which every configuration section reports a broken rule.

Only the standard library is imported, so that the launcher can use it on a machine without torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from parallel.dispatcher import DEEPEP_RANKS, Dispatcher

CUDA_QUEUES = 32
"""Hardware queues between a process and its GPU (CUDA_DEVICE_MAX_CONNECTIONS), the most there are. Streams
that share one wait for each other: with CUDA's default of 8, exchanges of different groups could, in an order
that no rank knows of. megatron-core's advice of 1 is for tensor parallelism, which is not used here."""

CUDA_ALLOCATOR = "expandable_segments:True"
"""PYTORCH_CUDA_ALLOC_CONF of every rank. The rows of an expert differ from pass to pass: without it, torch's
allocator keeps a segment for each size that it has seen, 4 to 20 GB of them in reports of others who train
mixtures of experts. torch 2.13 reads this name, PYTORCH_ALLOC_CONF only where it is not set; megatron-core
looks at this name, too. Memory that NCCL registers by torch's allocator hook, and that CUDA graphs of
Transformer Engine read with NCCL_GRAPH_REGISTER, must not come from such segments; this project uses neither.
Page-locked host memory, NCCL's own buffers and NVSHMEM's are not torch's, and stay as they are."""


class Problem(NamedTuple):
    """One broken rule of the configuration."""

    key: str
    """Dotted path of the value, seen from the section that reports it."""
    value: object
    """The value as configured."""
    rule: str
    """What the value must satisfy, with the numbers it was held against."""
    remedy: str
    """What to change."""

    def under(self, section: str) -> "Problem":
        """The same problem seen from the section that holds this one."""
        return self._replace(key=f"{section}.{self.key}")


def not_positive(section: object, names: Iterable[str]) -> list[Problem]:
    """Problems of the named fields that are not above zero."""
    values = ((name, getattr(section, name)) for name in names)
    return [
        Problem(name, value, "must be positive", "use a value above 0")
        for name, value in values
        if value <= 0
    ]


class DepMode(Enum):
    """Where the vision tower runs."""

    decoupled = "decoupled"
    """On every rank, outside the pipeline's schedule: each encodes an equal share of the global batch."""
    coupled = "coupled"
    """In the first pipeline stage, ahead of the embedding."""


class DepSchedule(Enum):
    """When the decoupled tower runs."""

    upfront = "upfront"
    """Forward before the pipeline's schedule, backward after it."""
    bubbles = "bubbles"
    """Both in the times in which the pipeline's schedule leaves ranks idle, as far as these reach."""


class ContextExchange(Enum):
    """How ranks that share a sequence get each other's latents, from which keys and values are made."""

    all_gather = "all_gather"
    """All of them at once; a rank attends to all keys together."""
    ring = "ring"
    """From neighbour to neighbour, while a rank attends to the keys of those that it has."""


class WireFormat(Enum):
    """Format of numbers in flight."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass(slots=True, kw_only=True)
class ParallelismConfig:
    """How many ways each kind of parallelism cuts the model; the data-parallel size is derived."""

    pp: int
    """Pipeline stages (ranks). Source: 16 in the K2 report, section 2.4."""
    vpp: int
    """Model chunks per pipeline rank; above 1 the interleaved 1F1B schedule runs. Source: K2 report,
    section 2.4, which does not disclose the degree."""
    ep: int
    """Ranks that share the routed experts of a layer. Source: 16 in the K2 report, section 2.4."""
    cp: int
    """Ranks that share the tokens of a sequence (context parallelism). Source: whether K2.5 had it is not
    disclosed; Kimi-VL and Kimi K3 do."""
    cp_exchange: ContextExchange | None
    """How they exchange latents; null is what the plan finds faster among what fits. Source: not disclosed,
    our choice."""
    layout: str | None
    """Layers of each chunk in pipeline order, e.g. `Ett|tt|tt|tL` (`parallel.pipeline.layout`). Null balances
    the cost of the ranks (`parallel.pipeline.balance`). Source: not disclosed, our choice."""
    dispatcher: Dispatcher
    """How tokens get to the ranks of their experts. Source: not disclosed, our choice; K2 says that EP16 is
    small enough for the exchange to be hidden."""
    dispatcher_sms: int | None
    """SMs that the kernels of `deepep`, `hybridep` and `ncclep` take from computation; null is the library's
    own number. Source: not disclosed, our choice."""
    dispatcher_capacity: float | None
    """Rows that a rank can receive with `ncclep`, as a multiple of its even share; null with the others,
    which receive whatever arrives. Source: not disclosed, our choice."""
    overlap_expert_comm: bool
    """Whether the expert all-to-all of one micro-batch overlaps the computation of another, with one more
    warm-up micro-batch. Source: K2 report, section 2.4."""
    delay_wgrad: bool
    """Whether weight gradients are computed later than the gradients for the previous stage, while those are
    in flight. Source: K2 report, section 2.4."""
    overlap_grad_reduce: bool
    """Whether gradients are reduced over data-parallel ranks bucket by bucket, as they become ready; those of
    a decoupled encoder are reduced together, when its backward is complete. Source: not disclosed, our
    choice."""
    overlap_param_gather: bool
    """Whether updated parameters are gathered from data-parallel ranks bucket by bucket, as the next forward
    pass needs them; those of a decoupled encoder together. Source: not disclosed, our choice."""

    @property
    def cuda_queues(self) -> int:
        """Value that `CUDA_DEVICE_MAX_CONNECTIONS` must have, in every overlap mode."""
        return CUDA_QUEUES

    @property
    def cuda_allocator(self) -> str:
        """Value that `PYTORCH_CUDA_ALLOC_CONF` must have, in every layout."""
        return CUDA_ALLOCATOR

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = not_positive(self, ("pp", "vpp", "ep", "cp"))
        if self.vpp > 1 and self.pp == 1:
            found.append(
                Problem(
                    "vpp", self.vpp, "needs a pipeline (pp > 1) to interleave", "raise pp, or set vpp to 1"
                )
            )
        if self.cp == 1 and self.cp_exchange is not None:
            rule = "is for ranks that share sequences (cp > 1)"
            found.append(Problem("cp_exchange", self.cp_exchange.value, rule, "use null, or raise cp"))
        return found + self._dispatcher_problems() + self._overlap_problems()

    def _dispatcher_problems(self) -> list[Problem]:
        kind, ep, found = self.dispatcher, self.ep, []
        if kind is not Dispatcher.alltoall and ep == 1:
            rule = "needs experts spread over ranks (ep > 1): at ep=1 no token is sent"
            found.append(Problem("dispatcher", kind.value, rule, "use alltoall, or raise ep"))
        elif kind is Dispatcher.deepep and ep not in DEEPEP_RANKS:
            sizes = ", ".join(map(str, DEEPEP_RANKS))
            rule = f"has no settings for expert groups of {ep} ranks, only for {sizes}"
            found.append(Problem("dispatcher", kind.value, rule, "use alltoall, or one of these for ep"))
        return found + self._sms_problems() + self._capacity_problems()

    def _sms_problems(self) -> list[Problem]:
        sms = self.dispatcher_sms
        if sms is None:
            return []
        if self.dispatcher is Dispatcher.alltoall:
            rule = "is for deepep, hybridep and ncclep; NCCL chooses its own for alltoall"
            return [Problem("dispatcher_sms", sms, rule, "use null")]
        if sms < 2 or sms % 2:
            rule = "must be even and positive: half of them send, half receive"
            remedy = f"use {max(2, sms + sms % 2)}, or null for the library's own number"
            return [Problem("dispatcher_sms", sms, rule, remedy)]
        return []

    def _capacity_problems(self) -> list[Problem]:
        capacity = self.dispatcher_capacity
        if self.dispatcher is not Dispatcher.ncclep:
            rule = f"is for ncclep; {self.dispatcher.value} receives whatever arrives"
            return [] if capacity is None else [Problem("dispatcher_capacity", capacity, rule, "use null")]
        if capacity is None or capacity < 1:
            rule = "must be 1 or more: NCCL EP's buffers have that size, and more rows end the job"
            remedy = f"use {self.ep}, which no routing exceeds, or what memory allows"
            return [Problem("dispatcher_capacity", capacity, rule, remedy)]
        return []

    def _overlap_problems(self) -> list[Problem]:
        found = []
        if self.overlap_expert_comm:
            off = "set overlap_expert_comm and delay_wgrad to false"
            if self.ep == 1:
                rule = "needs experts spread over ranks (ep > 1): at ep=1 no token is sent"
                found.append(Problem("overlap_expert_comm", True, rule, f"raise ep, or {off}"))
            if self.pp > 1 and self.vpp == 1:
                rule = f"needs virtual stages in a pipeline (vpp > 1 at pp={self.pp}): only the interleaved "
                rule += "schedule overlaps a forward pass with another micro-batch's backward"
                found.append(Problem("overlap_expert_comm", True, rule, f"raise vpp, or {off}"))
        elif self.delay_wgrad:
            rule = "needs overlap_expert_comm=true: its schedule is what computes weight gradients later"
            remedy = "set overlap_expert_comm to true, or delay_wgrad to false"
            found.append(Problem("delay_wgrad", True, rule, remedy))
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            rule = (
                "needs overlap_grad_reduce=true: without it all parameters are one bucket, with no next one "
            )
            rule += "to gather ahead"
            remedy = "set overlap_grad_reduce to true, or overlap_param_gather to false"
            found.append(Problem("overlap_param_gather", True, rule, remedy))
        return found


@dataclass(slots=True, kw_only=True)
class DepConfig:
    """The encoder's process (K2.5 report, section 4.5.1). Only `mode` counts if that is `coupled`."""

    mode: DepMode
    """Where the vision tower runs. Source: decoupled in the K2.5 report."""
    schedule: DepSchedule
    """When it runs. Source: upfront in the K2.5 report."""
    max_patches_per_chunk: int
    """Number of patches that a rank encodes at a time, which bounds activations; a larger item is a chunk.
    Source: not disclosed, our choice."""
    split_items: bool
    """Whether an item that costs more than a rank's fair share is cut into parts of some of its rows, which
    several ranks encode concurrently; they exchange its keys and values in each layer. Source: not
    disclosed, our choice."""
    exchange_dtype: WireFormat | None
    """Format of features and their gradients in flight; null is `train.dtype`. Source: not disclosed, our
    choice."""
    feature_buffer_gib: float
    """Memory of a first-stage device, in GiB, for features of later micro-batches, and for the gradients of
    those that are complete; the rest waits in host memory. In bubbles the features of one micro-batch are
    received ahead of time, and gradients are sent at once. Source: not disclosed, our choice."""

    @property
    def separates_gradients(self) -> bool:
        """Whether gradients of features need a communicator of their own. Upfront, all features of a step
        precede all gradients on every rank, so that both can go through one."""
        return self.schedule is DepSchedule.bubbles

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = not_positive(self, ("max_patches_per_chunk",))
        if self.feature_buffer_gib < 0:
            rule, remedy = "must not be negative", "use 0 to keep all features in host memory"
            found.append(Problem("feature_buffer_gib", self.feature_buffer_gib, rule, remedy))
        if self.split_items and self.schedule is DepSchedule.bubbles:
            rule = "needs schedule=upfront: ranks encode an item concurrently, which idle times do not allow"
            remedy = "leave it out: in bubbles a large item only has to fit into the idle times of one rank"
            found.append(Problem("split_items", True, rule, remedy))
        return found
