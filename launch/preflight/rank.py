"""What one rank measured, and what it was doing when it could not continue."""

from dataclasses import dataclass, field, replace

from launch.preflight.path_mtu import PathTry
from launch.preflight.perftest import RawLink
from launch.preflight.rates import Link
from launch.preflight.system import Missing


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What a rank was doing when it could not continue."""

    text: str
    peer: int | None = None
    """Rank that was waited for; None if it was not a single one."""
    exchange: int | None = None
    """Number of the exchange between pairs; failures of later ones may be consequences."""

    def ended_by(self, error: Exception) -> "Fault":
        """This fault with the first line of the error."""
        first_line = str(error).strip().partition("\n")[0]
        return replace(self, text=f"{self.text}: {first_line}")


@dataclass(slots=True, kw_only=True)
class RankMeasurements:
    """Measurements of one rank; None for those not made."""

    gemm_tflops: float | None = None
    host_copy_gb_per_s: float | None = None
    links: list[Link] = field(default_factory=list)
    all_to_all_gb_per_s: float | None = None
    refused: dict[int, str] | None = None
    """Node leader -> why its node could not be reached from this one; None if this rank tried none."""
    transports: dict[str, int] | None = None
    """Kind of NCCL's connections to other nodes -> number of them; None if NCCL was not used."""
    paths: list[PathTry] | None = None
    """Packets to the same card of other nodes; None if this rank tried none."""
    raw_rates: list[RawLink] | Missing | None = None
    """Rates by perftest, by the client of each pair; None if this rank measured none."""
    fault: Fault | None = None
