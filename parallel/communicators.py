"""The communicators of a rank: what each is for, and how much of a GPU it may take. Standard library only.

A communicator of NCCL has one kernel in flight at a time, whose CTAs spin until the other ranks have come.
Features are posted long before their senders have them, and meanwhile experts, pipeline and gradients
communicate. NCCL calls this safe only while all kernels fit the GPU together: one that finds no SM free waits
for those that spin, while another rank waits for it (user guide, "Using multiple NCCL communicators
concurrently"). A CTA takes an SM of its own (640 threads of up to 96 registers), in clusters of four on
Hopper (`cgaClusterSize`). NCCL's own limit is 64 CTAs for each communicator, so each has one here.

`maxCTAs` bounds collectives, NVLS and sends alike, the last rounded up to a power of two (NCCL 2.29 and 2.30:
`src/graph/connect.cc`, `src/graph/paths.cc:ncclTopoComputeP2pChannels`, `src/transport/nvls.cc`); all limits
below are powers of two. Rates are those of the H800's eight cards of 50 GB/s; a channel moves 15 to 25 GB/s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from parallel.config import DepConfig, DepMode, ParallelismConfig

SMS = 132
"""Streaming multiprocessors of H100, H800 and H200 as SXM modules."""
CLUSTER = 4
"""CTAs of NCCL that need SMs of one GPC at once."""
MAX_SPINNING_CTAS = SMS // CLUSTER * CLUSTER - CLUSTER
"""SMs that kernels may occupy together: whole clusters, less one for GPCs with an odd number of them."""


class Operation(Enum):
    """What ranks do together in a communicator."""

    all_reduce = "all_reduce"
    all_gather = "all_gather"
    reduce_scatter = "reduce_scatter"
    all_to_all = "all_to_all"
    broadcast = "broadcast"


SHARDS = (Operation.reduce_scatter, Operation.all_gather)
"""Of gradients and weights that are sharded over ranks."""
OF_ALL_KINDS = tuple(Operation)
COLLECTIVES = tuple(kind for kind in Operation if kind is not Operation.all_to_all)
"""All but exchanges, for which NCCL connects every pair of a node, with a hundred MB for each channel."""


class Sends(Enum):
    """How a communicator carries what neighbouring stages send each other."""

    none = "none"
    """Not at all."""
    batched = "batched"
    """Among its ranks' other operations."""
    unbatched = "unbatched"
    """NCCL makes a separate communicator for each pair, when the two first meet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Communicator:
    """A kind of communicator that a rank is in."""

    name: str
    """Its name in what a run prints."""
    group: str
    """Name in megatron-core's collection of groups, or in `Topology`."""
    options: str
    """Key of `MAX_CTAS`."""
    max_ctas: int
    """Most CTAs of its kernel."""
    purpose: str
    """What it is for, and why no other communicator does."""
    operations: tuple[Operation, ...]
    """What its ranks do together. NCCL connects them for each kind when it is first used."""
    sends: Sends = Sends.none
    """How it carries the pipeline's sends."""
    kernels: int = 1
    """Most kernels in flight on a rank at a time: one for each pair."""
    is_in_step: bool = True
    """Whether its kernels can spin while those of others do."""


MAX_CTAS: Mapping[str, int] = {
    # Half of the tokens go over the card, 50 GB/s, and as many over NVLink meanwhile: 94 GB/s, of the 120
    # that eight channels move. Two for each card come near its peak, by a comment in NCCL's issue 438; two
    # for each peer on another node are its default. Each takes an SM from the computation that hides it. An
    # estimate: what preflight measures of the all-to-all is what to hold it against.
    "ep": 8,
    # A few numbers per expert.
    "tp_ep_mp": 4,
    # A ring has one channel for each of the node's eight cards, and a second one to overlap its steps.
    "dp_cp": 16,
    "ep_dp": 16,
    # A matrix and its update at a time, in the optimizer's part of the step. The second is its name where
    # ranks share sequences.
    "dp": 8,
    "tp_dp_cp": 8,
    # Latents of a layer's tokens: 576 numbers each, behind which attention waits.
    "cp": 8,
    # 59 MB per pass and neighbour, over one card.
    "pp": 4,
    # 3 GB per rank and step, most of it concurrently with the pipeline.
    "everyone": 8,
    # A tenth of the tokens, over one card.
    "features": 4,
    "feature_gradients": 4,
    # Norms, figures and what checkpoints say: few bytes. In a pipeline of two also its second direction.
    "world": 8,
}
"""Key of a group's options, megatron-core's or ours -> `maxCTAs`. Not disclosed anywhere, our choice."""


def communicators_of(sizes: ParallelismConfig, dep: DepConfig, world_size: int) -> list[Communicator]:
    """The communicators of several ranks that training, evaluation and checkpoints use, in the order in which
    ranks set them up. Others that megatron-core describes are never used, so NCCL never makes them."""
    if world_size == 1:
        return []
    of_stage = world_size // sizes.pp
    found = [_world(sizes)]
    # 1. The backbone's.
    if of_stage > 1:
        purpose = "gradients and weights that a stage shares"
        found.append(_of("weights", "dp_cp", "dp_cp", purpose, *COLLECTIVES))
        purpose = "Muon's matrices; counts of tokens, for which the host waits while weights are gathered"
        options = "dp" if sizes.cp == 1 else "tp_dp_cp"
        found.append(_of("matrices", "tp_dp_cp", options, purpose, *OF_ALL_KINDS))
    if sizes.cp > 1:
        purpose = "latents of tokens that other ranks attend to, and their gradients; counts of the router"
        contexts = _of("contexts", "cp", "cp", purpose, *OF_ALL_KINDS)
        found.append(replace(contexts, sends=Sends.batched))
    if of_stage > sizes.ep:
        purpose = "the same of experts, which fewer ranks share"
        found.append(_of("experts' weights", "expt_dp", "ep_dp", purpose, *SHARDS))
    if sizes.ep > 1:
        tokens = _of("tokens", "ep", "ep", "tokens to experts and back", Operation.all_to_all)
        # Other dispatchers have kernels of their own, whose SMs count in place of these.
        found.append(replace(tokens, max_ctas=max(tokens.max_ctas, sizes.dispatcher_sms or 0)))
        purpose = "counts of tokens: the host waits for them, so they must not queue behind tokens"
        found.append(_of("token counts", "tp_ep", "tp_ep_mp", purpose, Operation.all_gather))
    if sizes.pp > 1:
        found.append(_pipeline(sizes))
    # 2. The decoupled encoder's.
    if dep.mode is DepMode.decoupled:
        purpose = "the encoder's weights and gradients, reduced while the pipeline runs; parts of split items"
        # Owners of the encoder's matrices are few and meet those that hold parts of them in the first update.
        found.append(_of("encoder", "everyone", "everyone", purpose, *SHARDS))
        purpose = "features to first stages, posted a pass ahead"
        found.append(_of("features", "features", "features", purpose, Operation.all_reduce))
        if dep.separates_gradients:
            purpose = "their gradients, posted between features in an order of each rank's own"
            name = "feature_gradients"
            found.append(_of("feature gradients", name, name, purpose, Operation.all_reduce))
    return found


def _of(name: str, group: str, options: str, purpose: str, *operations: Operation) -> Communicator:
    return Communicator(
        name=name,
        group=group,
        options=options,
        max_ctas=MAX_CTAS[options],
        purpose=purpose,
        operations=operations,
    )


def _world(sizes: ParallelismConfig) -> Communicator:
    # megatron-core keeps the two directions of an interleaved pipeline of two apart by this group; torch has
    # connected it as a whole, so that no pair gets a communicator of its own.
    is_second_direction = sizes.pp == 2 and sizes.vpp > 1
    return Communicator(
        name="all ranks",
        group="world",
        options="world",
        max_ctas=MAX_CTAS["world"],
        purpose="torch's default: norms, figures, agreement, checkpoints, for which the host waits",
        operations=(Operation.all_reduce, Operation.all_gather, Operation.broadcast),
        sends=Sends.batched if is_second_direction else Sends.none,
        is_in_step=is_second_direction,
    )


def _pipeline(sizes: ParallelismConfig) -> Communicator:
    is_interleaved = sizes.vpp > 1
    return Communicator(
        name="pipeline",
        group="pp",
        options="pp",
        max_ctas=MAX_CTAS["pp"],
        purpose="activations and their gradients between neighbouring stages; the step's number of tokens",
        operations=(Operation.broadcast,),
        sends=Sends.unbatched if is_interleaved else Sends.batched,
        kernels=min(sizes.pp - 1, 2) if is_interleaved else 1,
    )


def spinning_ctas(communicators: Sequence[Communicator]) -> int:
    """SMs that kernels of these communicators occupy if all spin at once."""
    return sum(each.max_ctas * each.kernels for each in communicators if each.is_in_step)


def neighbours(rank: int, pipeline: Sequence[int]) -> list[int]:
    """The stages that a rank exchanges with, in an order in which no rank waits in a circle: connections of
    even number first, then odd ones, and last the one from the last to the first stage if it shares a rank
    with both. With virtual stages the last and the first one are neighbours, too."""
    size = len(pipeline)
    links = [(pipeline[i], pipeline[(i + 1) % size]) for i in range(size if size > 2 else size - 1)]
    odd_one = links[size - 1 :] if size > 2 and size % 2 else []
    even = links[0 : len(links) - len(odd_one) : 2]
    ordered = [*even, *links[1 : len(links) - len(odd_one) : 2], *odd_one]
    return [second if rank == first else first for first, second in ordered if rank in (first, second)]
