"""Which checkpoint a run goes on from, if its nodes have some of their own as well; pure, torch-free."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """A checkpoint on a node's disk that one rank finds whole, as far as it is this rank's."""

    step: int
    save: str
    """Which save it is of: a step may be saved again after a crash, on some nodes alone."""
    after: str
    """The newest shared checkpoint when it was written (`identity_of`); empty if there was none."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is resumed from."""

    local: Candidate | None
    """The checkpoint on the nodes' disks; None for the shared one, or none."""
    why: str
    """Why no newer one on the nodes' disks, or what it saves; empty where there is nothing to tell."""


def choose(by_rank: Sequence[Sequence[Candidate]], shared_step: int, shared: str) -> Chosen:
    """The newest local checkpoint that all ranks find whole, if it is newer than the shared one.

    One counts only if it was written after the shared checkpoint that is the newest now. So whoever moves
    shared ones away to go back, or has them set aside as unsound, goes back on the nodes too.

    Args:
        by_rank: what each rank finds.
        shared_step: step of the newest shared checkpoint; 0 if there is none.
        shared: its identity; empty if there is none.
    """
    found = {each for candidates in by_rank for each in candidates if each.step > shared_step}
    newer = {each for each in found if each.after == shared}
    everywhere = newer.intersection(*map(set, by_rank)) if by_rank else set()
    if everywhere:
        best = max(everywhere)
        return Chosen(best, f"{best.step - shared_step:,} steps newer than the shared one")
    if newer:
        best = max(newer)
        lacking = [rank for rank, candidates in enumerate(by_rank) if best not in candidates]
        told = ", ".join(map(str, lacking[:4])) + (
            f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""
        )
        return Chosen(
            None,
            f"step {best.step:,} is on some nodes' disks, but not on those of ranks {told}, as they left it",
        )
    if found:
        return Chosen(
            None,
            f"step {max(found).step:,} on the nodes' disks is of another course of the run: not written "
            "after the newest shared checkpoint",
        )
    return Chosen(None, "")
