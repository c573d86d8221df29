"""Rules on nodes: what SLURM, kernels, connections and srun say of them. Pure."""

from collections.abc import Callable, Iterator, Sequence

from launch.blame.evidence import Evidence
from launch.blame.library_texts import peer_of
from launch.blame.rank_rules import is_victim, own_ends
from launch.blame.verdict import Accusation, Kind

LAUNCHER_DEATHS = ("Killed", "Segmentation fault", "Bus error", "Aborted")


def lost_nodes(evidence: Evidence) -> Iterator[Accusation]:
    """SLURM says that a node is down, does not respond, or is no longer the job's."""
    for node, state in evidence.lost.items():
        yield Accusation(kind=Kind.node_lost, node=node, reason=f"{node} is {state}")
    for failure in evidence.steps:
        if failure.what == "Node failure" and failure.node not in evidence.lost:
            reason = f"SLURM reported a failure of the node {failure.node}"
            yield Accusation(kind=Kind.node_lost, node=failure.node, reason=reason)


def kernel_messages(evidence: Evidence) -> Iterator[Accusation]:
    """A kernel says that it killed a rank for memory, or that hardware failed; not if all kernels say so,
    which nodes on one machine do."""
    ends = {(end.node, end.pid): end for end in evidence.ends}
    kinds = {"xid": Kind.device, "machine": Kind.machine, "disk": Kind.machine, "link": Kind.link}
    same: dict[str, set[str]] = {}
    for message in evidence.kernel:
        same.setdefault(message.text, set()).add(message.node)
    for message in evidence.kernel:
        end = None if message.pid is None else ends.get((message.node, message.pid))
        said = f"the kernel of {message.node} says: {message.text}"
        if message.kind == "out_of_memory" and end is not None:
            reason = f"rank {end.rank} on {message.node} was killed for memory; {said}"
            yield Accusation(
                kind=Kind.out_of_memory, node=message.node, rank=end.rank, reason=reason, at_s=end.at_s
            )
        elif message.kind in kinds and len(same[message.text]) == 1:
            yield Accusation(kind=kinds[message.kind], node=message.node, reason=said)


def memory_by_slurm(evidence: Evidence) -> Iterator[Accusation]:
    """SLURM says that a task of a node was killed for memory."""
    for failure in evidence.steps:
        if failure.what.startswith("Out Of Memory"):
            reason = f"SLURM says that a process on {failure.node} was killed for memory"
            yield Accusation(kind=Kind.out_of_memory, node=failure.node, reason=reason)


def launchers(evidence: Evidence) -> Iterator[Accusation]:
    """The first that srun reports is torchrun itself, ended by a signal; for a failed rank it ends with 1."""
    if not evidence.steps:
        return
    first = evidence.steps[0]
    if first.what.startswith(LAUNCHER_DEATHS) and not any(end.node == first.node for end in evidence.ends):
        reason = f"torchrun on {first.node} was ended first: {first.what}"
        yield Accusation(kind=Kind.launcher_killed, node=first.node, reason=reason)


def silent_starts(evidence: Evidence) -> Iterator[Accusation]:
    """A node could not start the step that tells where ranks meet."""
    if evidence.silent_start:
        reason = f"{evidence.silent_start} could not tell where ranks meet"
        yield Accusation(kind=Kind.no_start, node=evidence.silent_start, reason=reason)


def peers(evidence: Evidence) -> Iterator[Accusation]:
    """Ranks that lost a connection say to whom: the node that is an end of all of them."""
    pairs: set[tuple[str, str]] = set()
    for end in own_ends(evidence):
        if end.error is None:
            continue
        host = peer_of(f"{end.error.text}\n{end.error.raw}")
        nodes = evidence.nodes_at(host) if host else []
        if len(nodes) == 1 and nodes[0] != end.node:
            pairs.add((end.node, nodes[0]))
    if not pairs:
        return
    common = set.intersection(*(set(pair) for pair in pairs))
    # Of a single pair, either may be sick: the one that is named by the other and does not name it.
    named = common & {named for _, named in pairs} - (
        {namer for namer, _ in pairs} if len(pairs) == 1 else set()
    )
    if len(common) == 1 or len(named) == 1:
        (node,) = common if len(common) == 1 else named
        others = ", ".join(sorted({each for pair in pairs for each in pair} - {node}))
        yield Accusation(kind=Kind.peer, node=node, reason=f"connections between {node} and {others} failed")


def silent_ranks(evidence: Evidence) -> Iterator[Accusation]:
    """Ranks of one node left no trace of their end, while those of all others ended by themselves."""
    ended = {end.node for end in own_ends(evidence)}
    silent = [node for node in evidence.nodes if node not in ended]
    if ended and len(silent) == 1 and silent[0] in evidence.watched:
        reason = f"the ranks of all nodes ended by themselves, except those of {silent[0]}"
        yield Accusation(kind=Kind.silent, node=silent[0], reason=reason)


def first_in_log(evidence: Evidence) -> Iterator[Accusation]:
    """The first of which srun reports a failure, apart from nodes whose ranks are known to be victims."""
    victims = {end.node for end in evidence.ends} - {
        end.node for end in own_ends(evidence) if not is_victim(end)
    }
    others = [failure for failure in evidence.steps if failure.node not in victims]
    if others:
        first = others[0]
        reason = f"srun reported {first.node} first ({first.what})"
        yield Accusation(kind=Kind.first, node=first.node, reason=reason)


RULES: Sequence[Callable[[Evidence], Iterator[Accusation]]] = (
    lost_nodes,
    kernel_messages,
    memory_by_slurm,
    launchers,
    silent_starts,
    peers,
    silent_ranks,
    first_in_log,
)
