"""What can be said of who ended an attempt: accusations, how strong each kind is, and the verdict. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Confidence(StrEnum):
    """How much a verdict is worth."""

    certain = "certain"
    """The node or its kernel says so itself."""
    strong = "strong"
    """The rank's own end, which others do not explain."""
    weak = "weak"
    """The most likely of several explanations: counts only if it repeats at once."""
    none = "none"
    """No node is to blame, or it is not known which."""


class Kind(StrEnum):
    """What ended an attempt; the table in README.md has the evidence for each."""

    node_lost = "node_lost"
    out_of_memory = "out_of_memory"
    device = "device"
    machine = "machine"
    disk = "disk"
    left_early = "left_early"
    killed = "killed"
    crashed = "crashed"
    launcher_killed = "launcher_killed"
    stopped = "stopped"
    shared = "shared"
    checkpoint = "checkpoint"
    stuck = "stuck"
    own_error = "own_error"
    named_error = "named_error"
    no_start = "no_start"
    link = "link"
    peer = "peer"
    fault = "fault"
    aborted = "aborted"
    silent = "silent"
    first = "first"
    unknown = "unknown"


STRENGTH: Mapping[Kind, tuple[int, Confidence]] = {
    # SLURM and kernels speak of the node itself.
    Kind.node_lost: (100, Confidence.certain),
    Kind.out_of_memory: (95, Confidence.certain),
    Kind.device: (90, Confidence.certain),
    Kind.machine: (85, Confidence.certain),
    # What all ranks read is wrong, in whatever way they end then.
    Kind.checkpoint: (82, Confidence.none),
    Kind.shared: (80, Confidence.none),
    # How a rank ended, or did not.
    Kind.disk: (75, Confidence.strong),
    Kind.left_early: (72, Confidence.strong),
    Kind.crashed: (70, Confidence.strong),
    Kind.killed: (70, Confidence.strong),
    Kind.stopped: (65, Confidence.strong),
    Kind.launcher_killed: (62, Confidence.strong),
    Kind.own_error: (60, Confidence.strong),
    Kind.stuck: (55, Confidence.strong),
    # Explanations that may be others' symptoms.
    Kind.no_start: (45, Confidence.weak),
    Kind.link: (42, Confidence.weak),
    Kind.peer: (40, Confidence.weak),
    Kind.named_error: (35, Confidence.weak),
    Kind.fault: (30, Confidence.weak),
    Kind.aborted: (25, Confidence.weak),
    Kind.silent: (15, Confidence.weak),
    Kind.first: (10, Confidence.weak),
    Kind.unknown: (0, Confidence.none),
}
"""Kind -> rank among the kinds, and what a verdict of this kind is worth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accusation:
    """What one rule says."""

    kind: Kind
    node: str | None
    """None for what all nodes share."""
    reason: str
    rank: int | None = None
    at_s: float | None = None
    """When it happened, where that is known."""
    checkpoint: str = ""
    instead: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Who ended an attempt, as it is kept in the attempt's record."""

    node: str | None = None
    """The node to blame; None if none is, or if it is not known which."""
    rank: int | None = None
    """Its rank, if it is one rank's doing."""
    kind: str = Kind.unknown
    """A `Kind`."""
    reason: str = ""
    """In words, to follow `attempt 3 failed: `."""
    confidence: str = Confidence.none
    """A `Confidence`."""
    error: str = ""
    """The named error that is the cause, with its kind; empty if there is none."""
    checkpoint: str = ""
    """The checkpoint that does not load; empty if that is not why."""
    instead: str = ""
    """Another one that the ranks found to be whole; empty if there is none."""
