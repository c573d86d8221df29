"""What a rank is doing, and who holds up ranks that wait for each other. Pure: no clock, no store."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

BETWEEN_STEPS = "between steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """What one rank is doing."""

    rank: int
    step: int
    """Training step that the rank is working on, or has completed last; 0 before the first."""
    phases: tuple[str, ...]
    """Current phases, outermost first; empty between steps."""
    seconds: float
    """Time since the rank last entered or left a phase."""
    waits_for: tuple[int, ...]
    """Global ranks that the rank is communicating with; empty while it computes or reads."""
    may_be_long: bool
    """Whether the rank is in a phase without a time limit."""

    @property
    def doing(self) -> str:
        """Step and phases."""
        return f"step {self.step}: {' > '.join(self.phases) or BETWEEN_STEPS}"

    def __str__(self) -> str:
        text = f"rank {self.rank}, {self.doing}, for {self.seconds:.1f} s"
        return f"{text}, waits for {ranks_text(self.waits_for)}" if self.waits_for else text

    def to_json(self) -> str:
        """The state as text for the job's store; ranks as runs, since a collective may wait for thousands."""
        return json.dumps(asdict(self) | {"waits_for": _runs(self.waits_for)})

    @classmethod
    def from_json(cls, text: str | bytes) -> "RankState":
        """The state that `to_json` wrote."""
        fields = json.loads(text)
        ranks = tuple(rank for first, last in fields["waits_for"] for rank in range(first, last + 1))
        return cls(**fields | {"phases": tuple(fields["phases"]), "waits_for": ranks})


@dataclass(frozen=True, slots=True)
class Chain:
    """Ranks from one that waits to those that hold it up."""

    path: tuple[int, ...]
    """Ranks of which each waits for the next; the last is a culprit, or waits for an earlier one."""
    culprits: tuple[int, ...]
    """Ranks that wait for nobody, or do not answer. Empty if all wait in a cycle."""
    cycle: tuple[int, ...]
    """Ranks that wait for each other, if there are no culprits."""


def blocking_chain(states: Mapping[int, RankState], first: int) -> Chain:
    """The ranks that hold up rank `first`, found breadth first along `waits_for`.

    `states` has the ranks that answered; a missing rank that others wait for counts as a culprit. The path is
    a shortest one, to the lowest of the nearest culprits.
    """
    # 1. Every rank that `first` waits for, directly or through others.
    came_from: dict[int, int | None] = {first: None}
    queue = [first]
    for rank in queue:
        for peer in sorted(_peers(states, rank)):
            if peer not in came_from:
                came_from[peer] = rank
                queue.append(peer)
    # 2. Where waiting ends; nowhere if it goes in a cycle.
    culprits = [rank for rank in queue if not _peers(states, rank)]
    cycle = [] if culprits else _cycle(states, queue)
    # 3. Back to `first`.
    path: list[int] = []
    step: int | None = culprits[0] if culprits else cycle[0]
    while step is not None:
        path.insert(0, step)
        step = came_from[step]
    return Chain(tuple(path), tuple(sorted(culprits)), tuple(sorted(cycle)))


def _peers(states: Mapping[int, RankState], rank: int) -> tuple[int, ...]:
    return states[rank].waits_for if rank in states else ()


def _cycle(states: Mapping[int, RankState], ranks: list[int]) -> list[int]:
    """The ranks that remain when those that nobody (any longer) waits for are removed one by one."""
    num_waiting = Counter(peer for rank in ranks for peer in _peers(states, rank))
    free = [rank for rank in ranks if not num_waiting[rank]]
    for rank in free:
        for peer in _peers(states, rank):
            num_waiting[peer] -= 1
            if not num_waiting[peer]:
                free.append(peer)
    return [rank for rank in ranks if num_waiting[rank]]


def findings(
    answers: Mapping[int, RankState], last_seen: Mapping[int, RankState], first: int, world_size: int
) -> dict[str, Any]:
    """What `report` says of culprits, for programs: JSON's types.

    `silent` are ranks that do not answer, `culprits` those that answer and wait for nobody, `cycle` those
    that wait for each other; `doing` says what silent ranks did last, and what culprits do.
    """
    chain = blocking_chain(answers, first)
    silent = [rank for rank in range(world_size) if rank not in answers]
    known = {**last_seen, **answers}
    culprits = [rank for rank in chain.culprits if rank in answers]
    return {
        "first": first,
        "silent": silent,
        "culprits": culprits,
        "cycle": list(chain.cycle),
        "doing": {str(rank): known[rank].doing for rank in (*silent, *culprits) if rank in known},
    }


def report(
    answers: Mapping[int, RankState],
    last_seen: Mapping[int, RankState],
    first: int,
    world_size: int,
    *,
    headline: str,
    logs: str,
) -> str:
    """The text that says what a job is stuck in.

    Args:
        answers: the states of the ranks that answered, rank `first` among them.
        last_seen: the last published states, for ranks that do not answer.
        first: the rank that noticed.
        headline: why the job ends.
        logs: where the stacks are.
    """
    # 1. The chain from the rank that noticed, and the culprits.
    chain = blocking_chain(answers, first)
    silent = [rank for rank in range(world_size) if rank not in answers]
    lines = [headline, "who waits for whom:"]
    lines += [f"  {_line(rank, answers, last_seen)}" for rank in chain.path]
    if chain.cycle:
        lines.append(
            f"likely culprit: none alone; {ranks_text(chain.cycle)} wait for each other: a message is lost, "
            "or they disagree about what comes next"
        )
    for rank in sorted({*chain.culprits, *silent}):
        lines.append(f"likely culprit: {_line(rank, answers, last_seen)}")
    # 2. All ranks, grouped by what they are doing.
    lines.append("all ranks:")
    by_doing = sorted(answers.values(), key=lambda state: (state.doing, state.rank))
    for doing, group in groupby(by_doing, key=lambda state: state.doing):
        lines.append(f"  {ranks_text(state.rank for state in group)}: {doing}")
    if silent:
        lines.append(f"  {ranks_text(silent)}: no answer")
    lines.append(f"stacks: {logs}")
    return "\n".join(lines)


def _line(rank: int, answers: Mapping[int, RankState], last_seen: Mapping[int, RankState]) -> str:
    if rank in answers:
        return str(answers[rank])
    seen = f" (last seen in {last_seen[rank].doing})" if rank in last_seen else ""
    return f"rank {rank} does not answer: dead, stopped, or stuck in native code{seen}"


def ranks_text(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0-3, 8`."""
    runs = _runs(ranks)
    texts = [f"{first}-{last}" if first < last else str(first) for first, last in runs]
    is_one = len(runs) == 1 and runs[0][0] == runs[0][1]
    return f"rank{'' if is_one else 's'} {', '.join(texts)}"


def _runs(ranks: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighbours."""
    runs: list[tuple[int, int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1] = (runs[-1][0], rank)
        else:
            runs.append((rank, rank))
    return runs
