"""Rules on ranks: how each ended, what it said, and what the watchdog found. Pure."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from launch.blame.evidence import LEFT_EARLY, STALLED, Evidence, RankEnd, RankError
from launch.blame.library_texts import says_device_is_broken
from launch.blame.verdict import Accusation, Kind

LATE_S = 8.0
"""A SIGKILL so long after the first end is the launcher's or SLURM's, which clear away what is left."""
CRASHES = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGSYS", "SIGTRAP")
DISK_TROUBLE = ("EIO", "EROFS", "ESTALE", "ENODEV", "ENXIO", "ENOTCONN", "EUCLEAN", "EREMOTEIO", "ESHUTDOWN")
FULL = ("ENOSPC", "EDQUOT")
MACHINE_ERROR = "MachineError"
"""The error of a machine that refuses something: a file, memory, a package."""


def own_ends(evidence: Evidence) -> list[RankEnd]:
    """Ends of ranks that the launcher did not bring about."""
    return [end for end in evidence.ends if not end.is_closing]


def is_victim(end: RankEnd) -> bool:
    """Whether others explain this end: a peer that was gone, a stall, a request to end."""
    is_asked = end.signal_name in ("SIGTERM", "SIGINT", "SIGHUP")
    return is_asked or end.status in (0, STALLED) or (end.error is not None and end.error.is_of_peer)


def broken_devices(evidence: Evidence) -> Iterator[Accusation]:
    """The driver tells a rank that its device is broken."""
    for end in own_ends(evidence):
        error = end.error
        if error is not None and says_device_is_broken(f"{error.text}\n{error.raw}"):
            yield of_rank(Kind.device, end, f"has a broken device: {first_line(error.raw or error.text)}")


def shared_errors(evidence: Evidence) -> Iterator[Accusation]:
    """An error that every rank has by what they share: settings, data, a checkpoint."""
    everywhere = errors_everywhere(evidence)
    for end in own_ends(evidence):
        error = end.error
        if error is None or error.is_of_peer or error.is_fault:
            continue
        if error.kind == "DamagedCheckpointError":
            reason = f"the checkpoint {error.path} does not load: {first_line(error.text)}"
            yield Accusation(
                kind=Kind.checkpoint, node=None, reason=reason, checkpoint=error.path, instead=error.instead
            )
        elif error.is_shared or error.kind in everywhere:
            reason = f"no node is to blame: {error.kind}: {first_line(error.text)}"
            yield Accusation(kind=Kind.shared, node=None, reason=reason)


def errors_everywhere(evidence: Evidence) -> frozenset[str]:
    """The kind of error with which ranks of at least two nodes ended, and all that have errors of their own.

    They agreed on it, or each met it by itself; none if they say on which rank it was.
    """
    errors = [(end.node, end.error) for end in own_ends(evidence) if end.error and not end.error.is_of_peer]
    kinds, nodes = {error.kind for _, error in errors}, {node for node, _ in errors}
    is_agreed = any(error.of_ranks for _, error in errors)
    return frozenset(kinds) if len(kinds) == 1 and len(nodes) > 1 and not is_agreed else frozenset()


def disk_errors(evidence: Evidence) -> Iterator[Accusation]:
    """A rank could not use a disk or mount of its node; a shared folder that is full or read-only is
    nobody's."""
    for end, error, ranks in errors_with_ranks(evidence):
        if error.code not in (*DISK_TROUBLE, *FULL):
            continue
        # Rank 0 makes folders there before others write: that it alone met a read-only one says nothing of
        # its node, and a node's own mount fails preflight.
        is_first_alone = error.code == "EROFS" and tuple(ranks) == (0,)
        if (error.code in FULL or is_first_alone) and lies_in(error.path, evidence.run):
            reason = f"no node is to blame: {error.kind}: {first_line(error.text)}"
            yield Accusation(kind=Kind.shared, node=None, reason=reason)
            continue
        for rank in ranks:
            node = evidence.node_of(rank)
            reason = f"rank {rank} on {node} could not use {error.path or 'a file'}: {first_line(error.text)}"
            yield Accusation(kind=Kind.disk, node=node, rank=rank, reason=reason, at_s=end.at_s)


def errors_with_ranks(evidence: Evidence) -> Iterator[tuple[RankEnd, RankError, Sequence[int]]]:
    """Errors of ranks' own, with the ranks on which they happened; what all agreed on comes once."""
    agreed: set[tuple[int, ...]] = set()
    for end in own_ends(evidence):
        if end.error is None or end.error.of_ranks in agreed:
            continue
        if end.error.of_ranks:
            agreed.add(end.error.of_ranks)
        yield end, end.error, end.error.of_ranks or (end.rank,)


def lies_in(path: str, folder: str) -> bool:
    """Whether a path is a folder or in it, or is not known."""
    return not path or not folder or f"{path}/".startswith(f"{folder}/")


def early_leavers(evidence: Evidence) -> Iterator[Accusation]:
    """A rank ended with status 0 before it was done; the others waited for it."""
    for end in own_ends(evidence):
        if end.status == LEFT_EARLY and end.error is None:
            yield of_rank(Kind.left_early, end, "ended with status 0 before training was over")


def signals(evidence: Evidence) -> Iterator[Accusation]:
    """A rank was ended by a signal that no launcher sends, or before any launcher would."""
    ends = own_ends(evidence)
    first_s = min((end.at_s for end in ends), default=0.0)
    for end in ends:
        if end.signal_name in CRASHES:
            yield of_rank(Kind.crashed, end, f"crashed with {end.signal_name}")
        elif end.signal_name == "SIGKILL" and end.at_s - first_s <= LATE_S:
            yield of_rank(Kind.killed, end, "was killed (SIGKILL: for its memory, or by somebody)")
        elif end.signal_name == "SIGABRT":
            yield of_rank(Kind.aborted, end, "aborted, as libraries do when a peer is gone, too")


def stalls(evidence: Evidence) -> Iterator[Accusation]:
    """The watchdog names ranks that do not answer, or for which the others wait."""
    stall = evidence.stall
    if stall is None:
        return
    for kind, ranks, what in (
        (Kind.stopped, stall.silent, "did not answer the watchdog: stopped, or stuck in native code"),
        (Kind.stuck, stall.culprits, "held up the others"),
    ):
        for rank in ranks:
            node, doing = evidence.node_of(rank), stall.doing.get(rank)
            reason = f"rank {rank} on {node} {what}" + (f" ({doing})" if doing else "")
            yield Accusation(kind=kind, node=node, rank=rank, reason=reason)


def own_errors(evidence: Evidence) -> Iterator[Accusation]:
    """A rank ended with an error that others do not have: of its machine, or of what only it has read."""
    everywhere = errors_everywhere(evidence)
    for end, error, ranks in errors_with_ranks(evidence):
        if end.signal_name or error.is_of_peer or error.is_shared:
            continue
        if error.kind in everywhere:
            if error.is_fault:
                reason = f"all nodes ended with {error.kind}: {first_line(error.text)}"
                yield Accusation(kind=Kind.fault, node=None, reason=reason)
            continue
        kind = Kind.own_error if error.kind == MACHINE_ERROR else Kind.named_error
        kind = Kind.fault if error.is_fault else kind
        what = f"ended with {error.kind}: {first_line(error.text)}"
        for rank in ranks:
            node = evidence.node_of(rank)
            yield Accusation(
                kind=kind, node=node, rank=rank, reason=f"rank {rank} on {node} {what}", at_s=end.at_s
            )


def of_rank(kind: Kind, end: RankEnd, what: str) -> Accusation:
    """An accusation of the node on which a rank ended."""
    reason = f"rank {end.rank} on {end.node} {what}"
    return Accusation(kind=kind, node=end.node, rank=end.rank, reason=reason, at_s=end.at_s)


def first_line(text: str) -> str:
    """The first line of a text, of a length that fits into a line of the log."""
    lines: Iterable[str] = text.strip().splitlines() or [""]
    return next(iter(lines))[:200]


RULES: Sequence[Callable[[Evidence], Iterator[Accusation]]] = (
    broken_devices,
    shared_errors,
    disk_errors,
    early_leavers,
    signals,
    stalls,
    own_errors,
)
