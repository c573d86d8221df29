"""How long a buffer is reduced or gathered in rings over ranks; torch-free."""

from typing import NamedTuple

from k25_train.config.schema import Config
from k25_train.plan.time.expert_exchange import NETWORK_SHARE
from k25_train.units import GB


class Ring(NamedTuple):
    """Seconds of a rank's links, which are in use concurrently."""

    network_s: float
    """Of its network card."""
    nvlink_s: float
    """Of its NVLink."""

    @property
    def seconds(self) -> float:
        """Duration."""
        return max(self)


def ring(
    config: Config, num_bytes: float, replicas: int, near: int, *, network_share: float = NETWORK_SHARE
) -> Ring:
    """A buffer of so many bytes over ranks, of which `near` neighbours are connected by NVLink.

    A ring passes through all of these before it leaves them, and there are as many rings as cards, so of what
    neighbours share each card carries its part alone.

    Args:
        config: the configuration, for the rates of links.
        num_bytes: of the buffer.
        replicas: ranks.
        near: neighbours among them; 1 if there are none.
        network_share: of a card's rate that is reached.
    """
    sent = num_bytes * (replicas - 1) / replicas
    network_s = nvlink_s = 0.0
    if replicas > near:
        network_s = sent / near / (GB * config.cluster.network_gb_per_s * network_share)
    if near > 1 and config.cluster.rates.nvlink_gb_per_s is not None:
        nvlink_s = sent / (GB * config.cluster.rates.nvlink_gb_per_s)
    return Ring(network_s, nvlink_s)
