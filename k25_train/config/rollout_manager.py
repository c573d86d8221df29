"""How many rollouts live at once, where, and how long each phase may take. Values are our choice."""

from dataclasses import dataclass
from enum import Enum

from k25_train.config.basics import not_negative
from parallel.config import Problem, not_positive

MOST_PORT = 2**16 - 1


class Placement(Enum):
    """Where the event loops of rollouts are."""

    in_process = "in_process"
    """One, in the first rank's process."""
    processes = "processes"
    """Processes next to the first rank's, one for each shard."""
    ray = "ray"
    """Actors of a Ray cluster, on whichever nodes it has."""


@dataclass(slots=True, kw_only=True)
class ManagerConfig:
    """How many rollouts live at once, where, and how long each phase may take."""

    placement: Placement
    """Where the event loops of rollouts are."""
    shards: int
    """Event loops; rollouts are divided among them."""
    max_live: int
    """Rollouts that live at once, in all shards together."""
    max_sandboxes: int
    """Sandboxes that are open at once, in all shards together."""
    kv_low: float
    """Share of an engine's cache of keys and values below which more rollouts are admitted."""
    kv_high: float
    """Share above which fewer are."""
    max_turns: int
    """Turns of one rollout; a task may allow fewer."""
    max_observation_tokens: int
    """Longest result of a tool; what is longer is cut in the middle, and says so."""
    tool_timeout_s: float
    """Seconds that one call of a tool may take; the policy is told when it was too long."""
    rollout_timeout_s: float
    """Seconds that an attempt may take from its first turn to its last."""
    teardown_timeout_s: float
    """Seconds that an environment gets to close; what hangs then is left behind, and named."""
    stuck_s: float
    """Seconds without progress in a phase after which a rollout is named in the log, with phase and cause."""
    max_restarts: int
    """Times that a rollout starts over because its environment failed, before its task is given up, which
    ends the run with its name."""
    gateway_host: str
    """Address on which shards listen for agents."""
    gateway_port: int
    """First port of the shards' gateways, one each; 0 for free ones."""
    status_port: int | None
    """Port of the status page and of Prometheus' metrics, on localhost; null for neither."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        names = (
            "shards", "max_live", "max_sandboxes", "max_turns", "max_observation_tokens", "tool_timeout_s",
            "rollout_timeout_s", "teardown_timeout_s", "stuck_s",
        )  # fmt: skip
        found = not_positive(self, names) + not_negative(self, ("max_restarts", "gateway_port"))
        if self.placement is Placement.in_process and self.shards > 1:
            rule = "must be 1 with rollout.manager.placement=in_process, which is one event loop"
            remedy = "use rollout.manager.placement=processes, or ray on several nodes"
            found.append(Problem("shards", self.shards, rule, remedy))
        if not 0 < self.kv_low < self.kv_high <= 1:
            rule = f"must be above 0 and below kv_high={self.kv_high}, which is at most 1"
            found.append(Problem("kv_low", self.kv_low, rule, "use e.g. 0.6 and 0.9"))
        ports = {"gateway_port": self.gateway_port, "status_port": self.status_port or 0}
        found += [
            Problem(name, port, f"must be a port, at most {MOST_PORT}", "e.g. 8200")
            for name, port in ports.items()
            if port > MOST_PORT
        ]
        if self.status_port is not None and self.status_port < 1:
            found.append(Problem("status_port", self.status_port, "must be a port, or null", "e.g. 8190"))
        if not self.gateway_host.strip():
            found.append(Problem("gateway_host", self.gateway_host, "must be an address", "e.g. 127.0.0.1"))
        return found
