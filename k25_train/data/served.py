"""What each source has to give, and what it has given: figures that a run reports."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSummary:
    """A source, once it is open."""

    name: str
    """Its key in `data.sources`."""
    has_media: bool
    """Whether its samples may have images or video."""
    num_documents: int
    """Samples that are trained on in one epoch."""
    num_heldout: int
    """Samples that evaluations read."""
    num_tokens: int
    """Tokens of them, vision tokens included; an estimate where these are counted when they are drawn."""
    weight: float
    """Its weight at the first step of the run."""
    max_epochs: float | None
    """`data.sources.NAME.epochs`."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a source has given to a training step."""

    num_tokens: int
    """Tokens of the step without padding, vision tokens included."""


def with_media(sources: Iterable[SourceSummary]) -> frozenset[str]:
    """Names of those that have images or video."""
    return frozenset(source.name for source in sources if source.has_media)


def figures(served: Mapping[str, Served], loader_state: Mapping[str, Any]) -> dict[str, int | float]:
    """Columns of a step's metrics, of the sources that gave something: `source_tokens/NAME`, and
    `source_epochs/NAME`, passes over its samples since the run began.

    `loader_state` is where the loader is after the step (`HostInputs.state_after`).
    """
    tokens = {f"source_tokens/{name}": of.num_tokens for name, of in served.items()}
    positions = loader_state.get("sources", {})
    epochs = {name: positions[name]["epochs_used"] for name in served if name in positions}
    return tokens | {f"source_epochs/{name}": round(passes, 6) for name, passes in epochs.items()}
