"""Every layout and choice that a search looks at, by arithmetic alone; torch-free.

The checks of training have the last word (`Offer.find_problems`). What is left out here are sizes that no
check would pass, and what is no matter of layout: rates, widths, formats, the global batch.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from k25_train.config.basics import data_parallel_size, ranks_of_stage
from k25_train.config.cluster import Device
from k25_train.config.optimizer import OptimizerOffload
from k25_train.config.schema import Config
from k25_train.config.vision import VisionPart
from parallel.config import ContextExchange, DepMode, DepSchedule
from parallel.dispatcher import Dispatcher
from parallel.pipeline.layout import most_chunks

MICRO_BATCH_SIZES = (1, 2)
"""Sequences of a micro-batch. Source: published runs of such models have 1 and 2."""


MOST_VIRTUAL_STAGES = 8
"""Chunks of a rank. Source: the most that published runs of such models have is 8 (DeepSeek-V3 on GB300)."""


LEAST_SHARE_TOKENS = 4096
"""Tokens of a micro-batch that a rank has at least where ranks share sequences, but for what is configured.
Source: our choice, what ranks have in K2's 4K stage."""
MOST_SHARING = 128
"""Ranks that share sequences at most. Our choice."""

GroupKey = tuple[int, int, int, int]
"""Its pp, vpp, ep and cp."""


class Layout(NamedTuple):
    """How the model is cut, and how its parts exchange."""

    pp: int
    vpp: int
    ep: int
    micro_batch_size: int
    dispatcher: Dispatcher
    overlaps: bool
    """`parallelism.overlap_expert_comm`."""
    delays: bool
    """`parallelism.delay_wgrad`."""
    cp: int = 1
    exchange: ContextExchange | None = None
    """`parallelism.cp_exchange`; None where ranks have whole sequences."""

    @property
    def group(self) -> GroupKey:
        """What a line of the ranking is for: pp, vpp, ep and cp."""
        return self.pp, self.vpp, self.ep, self.cp


class Choice(NamedTuple):
    """What is decided for a layout: where things wait for their turn."""

    activation: str
    """Choice of `conf/activation`, or AS_CONFIGURED."""
    offload: OptimizerOffload
    """Place of the optimizer's state."""
    mode: DepMode
    """Place of the vision tower."""
    schedule: DepSchedule
    """When a decoupled tower runs."""


class Candidate(NamedTuple):
    """A layout with a choice: a whole configuration."""

    layout: Layout
    choice: Choice


class Group(NamedTuple):
    """Layouts of the same pipeline and expert sizes, or the reason why there is none."""

    pp: int
    vpp: int
    ep: int
    cp: int
    why_not: str

    @property
    def key(self) -> GroupKey:
        """Its sizes."""
        return self.pp, self.vpp, self.ep, self.cp


def sharing_sizes(config: Config) -> list[int]:
    """How many ranks may share sequences: as many as are configured, and powers of two where sequences are
    long."""
    train = config.train
    tokens, sizes = train.seq_len * train.micro_batch_size, {1, config.parallelism.cp}
    if config.model.has_latent_attention:
        doublings = (1 << number for number in range(1, MOST_SHARING.bit_length()))
        sizes |= {size for size in doublings if tokens % size == 0 and tokens // size >= LEAST_SHARE_TOKENS}
    return sorted(sizes)


def groups(config: Config) -> list[Group]:
    """Every pp, vpp, ep and cp that layers, experts, tokens and ranks allow, and what rules each out, if
    anything."""
    world, model = config.world_size, config.model
    most, found = most_chunks(model.num_layers), list[Group]()
    for pp in _divisors(world):
        if pp > most:
            break
        dp = ranks_of_stage(world, pp)
        for vpp in range(1, min(MOST_VIRTUAL_STAGES, most // pp) + 1 if pp > 1 else 2):
            sizes = _divisors(math.gcd(model.num_experts, dp) if model.num_moe_layers else 1)
            for ep, cp in itertools.product(sizes, sharing_sizes(config)):
                found.append(Group(pp, vpp, ep, cp, _why_not(config, pp, vpp, cp)))
    return found


def layouts_of(config: Config, group: Group) -> Iterator[Layout]:
    """Every layout of a group."""
    if group.why_not:
        return
    pp, vpp, ep, cp, _ = group
    dp = data_parallel_size(config.world_size, pp, cp)
    batch = config.train.global_batch_size
    ways = [(False, False)]
    if ep > 1 and (vpp > 1 or pp == 1):
        ways += [(True, False), (True, True)]
    for size in MICRO_BATCH_SIZES:
        number, rest = divmod(batch, size * dp)
        for overlaps, delays in ways:
            if rest or number < _least_micro_batches(pp, vpp, overlaps):
                continue
            exchanges = list(ContextExchange) if cp > 1 else [None]
            for dispatcher, exchange in itertools.product(_dispatchers(config, ep), exchanges):
                yield Layout(pp, vpp, ep, size, dispatcher, overlaps, delays, cp, exchange)


def choices(config: Config, activations: list[str], vision_share: float) -> list[Choice]:
    """Every choice that there is for any layout.

    Args:
        config: the configuration.
        activations: names of activation policies.
        vision_share: of tokens; without images the tower stays where it is.
    """
    modes = [(config.dep.mode, config.dep.schedule)]
    if vision_share and VisionPart.tower in config.vision_placement.trained_parts:
        modes = [
            (DepMode.coupled, DepSchedule.upfront),
            (DepMode.decoupled, DepSchedule.upfront),
            (DepMode.decoupled, DepSchedule.bubbles),
        ]
    return [
        Choice(activation, offload, *mode)
        for activation in activations
        for offload in OptimizerOffload
        for mode in modes
    ]


def _why_not(config: Config, pp: int, vpp: int, cp: int) -> str:
    """Why a group has no layout; empty if it has."""
    of_stage = ranks_of_stage(config.world_size, pp)
    if of_stage % cp:
        return f"{of_stage:,} ranks of a stage are not shared by {cp} of each sequence"
    dp, batch = of_stage // cp, config.train.global_batch_size
    if batch % dp:
        return f"{batch:,} sequences do not divide by {dp:,} replicas"
    least = _least_micro_batches(pp, vpp, overlaps=False)
    if batch // dp < least:
        return f"needs {least} micro-batches per replica, and there are {batch // dp}"
    return ""


def _least_micro_batches(pp: int, vpp: int, overlaps: bool) -> int:
    """The fewest of a step on a replica, as `compose/checks.py:batches_divide` has it."""
    return pp if vpp > 1 else 1 + overlaps


def _dispatchers(config: Config, ep: int) -> list[Dispatcher]:
    """What may carry tokens; NCCL EP, which needs a bet on routing, only if it is configured."""
    if ep == 1 or config.cluster.device is not Device.cuda:
        return [Dispatcher.alltoall]
    found = [Dispatcher.alltoall, Dispatcher.deepep, Dispatcher.hybridep]
    configured = config.parallelism.dispatcher
    return found if configured in found else [*found, configured]


def _divisors(number: int) -> list[int]:
    small = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})
