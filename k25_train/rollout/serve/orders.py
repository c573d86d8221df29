"""What is to be served, and how."""

from dataclasses import dataclass
from pathlib import Path

from k25_train.rollout.serve.folder import ServedFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOrder:
    """One server."""

    folder: ServedFolder
    """What it serves."""
    host: str
    """Address that it listens on."""
    port: int
    """Port that it listens on."""
    weights: str
    """Number format, as `rollout.weights`."""
    label: int
    """Version of the weights."""
    max_running: int
    """Responses at once."""
    max_model_len: int | None
    """Longest prompt and response together; None for the model's."""
    device: str
    """Of the in-process engine."""
    threads: int
    """Of arithmetic on a CPU."""
    python: Path
    """What runs vLLM."""
    start_timeout_s: float
    """Seconds within which it has to answer."""
    log: Path
    """File of vLLM's output."""
    more: list[str]
    """More of vLLM's own options."""

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://{self.host}:{self.port}"
