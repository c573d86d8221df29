"""What the records of a journal amount to: groups that are open, and how far tasks were given out.

Each record has a key and counts once, however often it is read: `admitted` by its group, `consumed` by its
step, those of a response as `response_records.py` says. Only open groups are kept, so that memory does not
grow with the run.
"""

from collections.abc import Callable
from typing import Any

from k25_train.errors import RolloutError
from k25_train.rollout.records import Record
from k25_train.rollout.response_records import KINDS, apply_record
from k25_train.rollout.trajectory import Group, Response

BASE, ADMITTED, GROUPED, CONSUMED = "base", "admitted", "grouped", "consumed"
"""Kinds of records. `base` begins each file and says how many groups were admitted before it."""


def every_step(_step: int) -> bool:
    """Every step has the data that were made for it."""
    return True


class JournalState:
    """Open groups by number; every number below `num_admitted` that is not open was consumed."""

    def __init__(self, has_data: Callable[[int], bool] = every_step) -> None:
        """`has_data`: whether what a step was given is still there. Groups of one that lost it are open."""
        self._has_data = has_data
        self._settled = 0
        """Groups below were consumed before the first record that there is."""
        self.num_admitted = 0
        """Groups that were given out: the place of the next one."""
        self.open: dict[int, Group] = {}
        """Number -> group that no step has consumed."""
        self.consumed: dict[int, tuple[int, ...]] = {}
        """Step -> its groups, of the steps since the last `forget`."""

    @property
    def num_consumed(self) -> int:
        """Groups that a step has been given."""
        return self.num_admitted - len(self.open)

    def apply(self, record: Record) -> None:
        """Take a record in. Raises `RolloutError` for one that cannot follow those before it."""
        header = record.header
        try:
            match header["kind"]:
                case "base":
                    self._begin(header["admitted"])
                case "admitted":
                    self._admit(header)
                case "consumed":
                    self._consume(header["step"], tuple(header["groups"]))
                case "grouped":
                    pass
                case kind if kind in KINDS:
                    self._of_response(record)
                case kind:
                    raise RolloutError(f"a record of kind {kind!r}, which this version does not know")
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise RolloutError(
                f"a record that makes no sense: {dict(header)} ({type(error).__name__}: {error})"
            ) from error

    def forget(self, last_step: int) -> None:
        """Forget which groups steps up to `last_step` have consumed, which nobody asks for any more."""
        self.consumed = {step: groups for step, groups in self.consumed.items() if step > last_step}

    def settled_below(self, last_step: int) -> int:
        """Every group below was consumed by a step up to `last_step`."""
        later = [group for step, groups in self.consumed.items() if step > last_step for group in groups]
        return min([*later, *self.open, self.num_admitted])

    def _begin(self, num_admitted: int) -> None:
        # Of the first file alone this is news: what came before is gone because nobody needs it.
        if self.num_admitted == 0:
            self.num_admitted = self._settled = num_admitted
        elif num_admitted != self.num_admitted:
            raise RolloutError(
                f"{self.num_admitted} groups were admitted, but the next file begins behind {num_admitted}"
            )

    def _admit(self, header: dict[str, Any] | Any) -> None:
        number = header["group"]
        if number < self.num_admitted:
            return
        if number > self.num_admitted:
            raise RolloutError(f"group {number} follows group {self.num_admitted - 1}")
        self.open[number] = Group(
            number=number,
            task=header["task"],
            epoch=header["epoch"],
            version=header["version"],
            stamp=header["stamp"],
            responses=[Response() for _ in range(header["size"])],
        )
        self.num_admitted += 1

    def _of_response(self, record: Record) -> None:
        header = record.header
        group = self._group(header)
        if group is None:
            return
        # Images are of a whole group: whichever response they are applied to, it is not changed.
        sample = header.get("sample", 0)
        try:
            apply_record(record, group.responses[sample], group.media)
        except ValueError as error:
            raise RolloutError(f"group {group.number}, response {sample}: {error}") from error

    def _consume(self, step: int, groups: tuple[int, ...]) -> None:
        if not self._has_data(step):
            return
        again = [each for each in groups if self._settled <= each and each not in self.open]
        if again and self.consumed.get(step) != groups:
            raise RolloutError(f"step {step} would be given groups {again} that another step has had")
        for number in groups:
            self.open.pop(number, None)
        self.consumed[step] = groups

    def _group(self, header: Any) -> Group | None:
        """The group of a record; None for one that was consumed already."""
        if header["group"] >= self.num_admitted:
            raise RolloutError(f"a record of group {header['group']}, which was not admitted")
        return self.open.get(header["group"])


def admitted(group: Group) -> Record:
    """A group was given out."""
    return Record(
        {
            "kind": ADMITTED,
            "group": group.number,
            "task": group.task,
            "epoch": group.epoch,
            "version": group.version,
            "stamp": dict(group.stamp),
            "size": len(group.responses),
        }
    )


def grouped(group: int) -> Record:
    """All responses of a group have a reward."""
    return Record({"kind": GROUPED, "group": group})


def consumed(step: int, groups: tuple[int, ...]) -> Record:
    """The data of a step are on disk, made of these groups."""
    return Record({"kind": CONSUMED, "step": step, "groups": list(groups)})


def base(num_admitted: int) -> Record:
    """How a file begins."""
    return Record({"kind": BASE, "admitted": num_admitted})
