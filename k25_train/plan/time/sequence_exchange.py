"""How long ranks that share sequences exchange latents, and what of it attention has to wait for; torch-free.

All-gathered, latents are there before a rank attends to all keys at once, and gradients are reduced once it
has all of them. In a ring, a rank attends to the keys that it has while the next ones are on their way, and
their gradients travel with them. In the backward pass latents are exchanged once more: nobody keeps others'.
"""

from dataclasses import dataclass
from math import inf

from k25_train.config.schema import Config
from k25_train.plan.kernels.work import Setting
from k25_train.plan.memory.latents import latent_width
from k25_train.plan.time.expert_exchange import NETWORK_SHARE, message_factor, nvlink_ranks
from k25_train.plan.time.ring import Ring, ring
from k25_train.plan.weight_bytes import GRADIENT_BYTES
from k25_train.units import GB
from parallel.config import ContextExchange

HOP_S = 20e-6
"""What a message to the next rank, or a small reduction over the ranks of a sequence, takes whatever its
size. Source: 15 to 25 us is what nccl-tests show of small messages between nodes; our choice."""


@dataclass(frozen=True, slots=True)
class SequenceExchange:
    """One layer's latents in one direction of a pass, on one rank."""

    sent_bytes: float
    """Bytes that the rank sends."""
    links: Ring
    """Seconds of its links."""
    seconds: float
    """Duration if nothing else is sent."""
    hides: bool
    """Whether the rank attends to keys meanwhile."""


def sequence_exchange(setting: Setting, *, is_forward: bool) -> SequenceExchange:
    """Of a micro-batch in one layer; nothing where a rank has all tokens of its sequences."""
    config, sizes = setting.config, setting.sizes
    ranks, hides = sizes.cp, sizes.exchange is ContextExchange.ring
    if ranks == 1:
        return SequenceExchange(0.0, Ring(0.0, 0.0), 0.0, hides)
    each = setting.element_bytes + (0 if is_forward else GRADIENT_BYTES)
    own_bytes = sizes.tokens * latent_width(config.model) * each
    sent = (ranks - 1) * own_bytes
    near, factor = nvlink_ranks(config, ranks), message_factor(config)
    if hides:
        links = _hops(config, factor * sent, is_near=near == ranks)
        # Each hop waits for the slowest one, which leaves a node if any does.
        return SequenceExchange(sent, links, links.seconds + (ranks - 1) * HOP_S, hides)
    links = ring(config, factor * ranks * own_bytes, ranks, near)
    return SequenceExchange(sent, links, links.seconds + HOP_S, hides)


def _hops(config: Config, num_bytes: float, *, is_near: bool) -> Ring:
    """Messages from neighbour to neighbour: those that leave a node have one card."""
    cluster = config.cluster
    nvlink_s = num_bytes / (GB * (cluster.rates.nvlink_gb_per_s or inf))
    if is_near:
        return Ring(0.0, nvlink_s)
    return Ring(num_bytes / (GB * cluster.network_gb_per_s * NETWORK_SHARE), nvlink_s)
