"""Which checkpoints of a run go when old ones are pruned by hand, and why; pure."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum


class Condition(Enum):
    """What a folder with the name of a checkpoint holds."""

    sound = "sound"
    unsound = "unsound"
    damaged = "damaged"
    partial = "partial"
    """Of a save or a deletion that was interrupted."""


@dataclass(frozen=True, slots=True)
class Found:
    """One checkpoint of a run."""

    name: str
    """Of its folder."""
    step: int
    condition: Condition
    why: str
    """What is wrong with it; empty if it is sound."""
    num_bytes: int
    number: int = 0
    """Which of the run's checkpoints it is, from 1 on; 0 if that is not known, as before format 3."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one checkpoint."""

    found: Found
    goes: bool
    why: str


def decide(found: Sequence[Found], keep: int, keep_every: int, named: Collection[str]) -> list[Decision]:
    """Decide about each checkpoint, oldest step first.

    Args:
        found: all of a run.
        keep: so many of the newest sound ones stay, at least one.
        keep_every: every so-many-th of the run stays, if it is sound; 0 for none.
        named: folders that go though they are not sound, as the user wrote them.
    """
    by_age = sorted(found, key=lambda each: (each.condition is Condition.partial, each.step, each.name))
    newest = [each for each in by_age if each.condition is Condition.sound][-keep:]

    def decision(each: Found) -> Decision:
        if each.condition is Condition.partial:
            return Decision(each, True, "a save or a deletion was interrupted")
        if each.condition is not Condition.sound:
            is_named = each.name in named
            why = "named" if is_named else f"{each.condition.value}: goes if it is named with --also"
            return Decision(each, is_named, why)
        if each in newest:
            number = len(newest) - newest.index(each)
            return Decision(
                each, False, "the newest" if number == 1 else f"number {number} of the newest {keep}"
            )
        if keep_every and each.number and each.number % keep_every == 0:
            return Decision(each, False, f"the run's number {each.number:,}, a multiple of {keep_every:,}")
        return Decision(each, True, f"older than the newest {keep}")

    return [decision(each) for each in by_age]
