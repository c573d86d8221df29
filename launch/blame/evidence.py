"""What is known of how an attempt ended: the facts from which `judge` finds who ended it.

`launch.witnesses` collects them from the attempt's folder, SLURM and the nodes.
"""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LEFT_EARLY = 70
"""Exit status that a rank gets which ended with 0 before its command was done: EX_SOFTWARE of sysexits.h."""
STALLED = 75
"""`parallel.watchdog.stall_watchdog.STALLED_STATUS`, which `launch` must not import; a test compares them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankError:
    """What a rank said when it ended with an error."""

    kind: str
    """Class of the error, such as DataError."""
    text: str
    is_fault: bool = False
    """Whether it is an error of the code, not one that names what to do."""
    is_shared: bool = False
    """Whether every rank has it, by the same settings or files."""
    is_of_peer: bool = False
    """Whether it says that a connection to another rank failed."""
    code: str = ""
    """Name of the system's error number, such as EIO; empty for others."""
    path: str = ""
    """File or folder that it is about; empty for none."""
    instead: str = ""
    """Checkpoint that could be loaded in place of the damaged one at `path`; empty for none."""
    raw: str = ""
    """Text of the error as the library raised it, where it was named afterwards."""
    of_ranks: tuple[int, ...] = ()
    """Ranks on which it happened, if others raise it too, because they agreed on it; empty if not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnd:
    """The end of one rank, as the torchrun of its node saw it."""

    rank: int
    node: str
    pid: int
    status: int
    """Exit status, or minus the signal that ended it."""
    at_s: float
    """Time since the epoch, by the node's clock."""
    is_closing: bool = False
    """Whether torchrun was ending its ranks by then, because of another one."""
    error: RankError | None = None

    @property
    def signal_name(self) -> str:
        """The signal that ended it; empty if none did."""
        if self.status >= 0:
            return ""
        try:
            return signal.Signals(-self.status).name
        except ValueError:
            return f"signal {-self.status}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """The watchdog's report that no rank made progress."""

    silent: tuple[int, ...] = ()
    """Ranks that did not answer: stopped, dead, or stuck in native code."""
    culprits: tuple[int, ...] = ()
    """Ranks that answered and wait for nobody, while others wait for them."""
    doing: Mapping[int, str] = field(default_factory=dict)
    """Rank -> what it does, or was seen to do last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelMessage:
    """A line of a node's kernel from the time of the attempt."""

    node: str
    kind: str
    """Of `kernel_log.KINDS`."""
    text: str
    pid: int | None = None
    """The process that it is about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailure:
    """A line of srun on a node or a task that failed, in srun's order."""

    node: str
    what: str
    """Such as `Killed`; `Node failure` for the node itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that is known of an attempt's end."""

    nodes: Sequence[str]
    """The attempt's nodes, in the order of ranks."""
    ranks_per_node: int
    run: str = ""
    """The run folder, which all nodes share."""
    lost: Mapping[str, str] = field(default_factory=dict)
    """Node -> SLURM's state, of those that can run no step or are no longer the job's."""
    ends: Sequence[RankEnd] = ()
    stall: Stall | None = None
    kernel: Sequence[KernelMessage] = ()
    steps: Sequence[StepFailure] = ()
    silent_start: str = ""
    """The node that could not tell where ranks meet; empty if none."""
    addresses: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Node -> its addresses."""
    watched: Sequence[str] = ()
    """Nodes whose torchrun began to watch its ranks."""

    def node_of(self, rank: int) -> str:
        """The node of a rank."""
        return self.nodes[rank // self.ranks_per_node]

    def nodes_at(self, host: str) -> list[str]:
        """The nodes with this name or address; several if they share it, as nodes of one machine do."""
        return [node for node in self.nodes if node == host or host in self.addresses.get(node, ())]
